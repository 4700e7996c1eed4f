"""The command that comes after quantising, as a shell takes it."""
import shlex
from pathlib import Path

import torch


def sampling_command(path: Path, images: int, *flags: str) -> str:
    """Write the command that samples from what was quantised, on all GPUs of this machine.

    Args:
        path: of the checkpoint or folder, which knows its model, its widths and its steps.
        images: how many.
        flags: what else the command line says.
    """
    gpus = torch.cuda.device_count()
    launcher = ["torchrun", "--nnodes=1", f"--nproc_per_node={gpus}"] if gpus > 1 else ["python"]
    return shlex.join([*launcher, "sample_merge_TAS.py", "--path", str(path),
                       "--num-fid-samples", str(images), *flags])
