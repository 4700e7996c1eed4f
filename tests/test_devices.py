"""Recipes on a pretended accelerator, so that a tensor on the wrong device is noticed."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["on_accelerator.py", "offloading_on_accelerator.py"])
def test_recipes_run_on_an_accelerator(name):
    """Run the tests of a file in a process of their own.

    PyTorch's autograd counts devices when it first runs, so the pretended one has to be there
    before any other test computes a gradient.
    """
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", HERE / name],
        env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
