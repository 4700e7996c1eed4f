"""Sample images from a quantised DiT, smoothing factors folded, on any number of processes.

Writes PNGs, and an .npz for ADM's evaluator.

    torchrun --nnodes=1 --nproc_per_node=N sample_merge_TAS.py --image-size 256 --model DiT-XL/2 \\
        --num-fid-samples 10000 --act-bit 8 --weight-bit 4 --path /path/DiTAS_Model \\
        --num-sampling-steps 100
    # one process, no torchrun
    python sample_merge_TAS.py --path results/DiT-Digits-16-W4A8-ditas --num-fid-samples 64
    # the float model
    python sample_merge_TAS.py --model DiT-Digits --num-fid-samples 64
    # one job of an array of 16; then the .npz of what the 16 made
    python sample_merge_TAS.py --path … --shard 3/16
    python sample_merge_TAS.py --path … --assemble
    # the folder of a text-to-image pipeline of diffusers
    python sample_merge_TAS.py --path my-model --prompts prompts.txt --num-fid-samples 1000

The same command again continues where a killed one stopped.
"""
import os

LAUNCHER = os.getppid()  # before the imports take their seconds: torchrun may be gone after them

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import argparse

from cli import sample_flags
from cli.parser import Parser, run


def main(args: argparse.Namespace) -> None:
    """Make the images that the command line asks for."""
    # Not above: PyTorch takes seconds to load, which help and a wrong flag do not need.
    from cli.sample import sample_images
    sample_images(args, LAUNCHER)


def make_parser() -> Parser:
    """Make the parser of the command line."""
    return sample_flags.make_parser(__doc__)


if __name__ == "__main__":
    run(main, make_parser())
