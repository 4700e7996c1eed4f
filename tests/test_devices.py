"""Every recipe on a pretended accelerator, so that a tensor on the wrong device is noticed."""
import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).with_name("on_accelerator.py")


def test_every_recipe_runs_on_an_accelerator():
    """Run the tests of ``on_accelerator.py`` in a process of their own.

    PyTorch's autograd counts devices when it first runs, so the pretended one has to be there
    before any other test computes a gradient.
    """
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", FILE],
        env=environment, capture_output=True, text=True, cwd=FILE.parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
