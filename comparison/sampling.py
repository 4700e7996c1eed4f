"""The one place where the comparison meets sample_merge_TAS.py."""
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from cli.sample import sample_images
from cli.sample_flags import make_parser
from errors import UserError

SCRIPT = Path(__file__).parents[1] / "sample_merge_TAS.py"


def sample(arguments: list[str], processes: int) -> None:
    """Do what sample_merge_TAS.py does, on as many processes.

    A single one is this process, which has loaded its libraries already.

    Raises:
        UserError: it ended before all images were there.
    """
    launcher = []
    if processes > 1:
        launcher = [
            "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={processes}"]
    command = [*launcher, str(SCRIPT), *arguments]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    if processes == 1:
        _sample_here(arguments)
        return
    status = subprocess.run([sys.executable, *command]).returncode
    if status:
        raise UserError(
            f"sampling ended with status {status}: see above, then run the same command again")


def _sample_here(arguments: list[str]) -> None:
    # It sets the number that was asked for.
    threads = torch.get_num_threads()
    sample_images(make_parser("").parse_args(arguments), os.getppid())
    torch.set_num_threads(threads)
