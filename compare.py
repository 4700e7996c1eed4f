"""Quantise one model with several recipes and bit widths, sample, judge: one table.

It is printed and written as Markdown and CSV, with --report also as pictures.

    # the bundled model, on two CPU cores
    python compare.py --model DiT-Digits-Outliers --report results/report
    python compare.py --model DiT-Digits-Outliers \\
        --recipes rtn ditas ditas:lowrank=0 ditas:group-size=32 --bits W4A8 W8A8

    # the ablation of the DiTAS paper: naive, + TAS, + grid search, + low rank
    python compare.py --model DiT-Digits-Outliers --recipes rtn \\
        rtn:balance=tas,alpha=0.5 \\
        rtn:balance=tas,alpha=grid \\
        rtn:balance=tas,alpha=grid,lowrank=paper

    # tables 1, 2, 5 and 6 of Q-DiT stand in docs/recipes.md, with the same flags for DiT-XL/2

    # table 4 of Q-DiT: round to nearest, + groups, + dynamic activations, + allocation, + GPTQ
    NEAREST=qdit:weight=nearest
    STATIC=act-granularity=tensor,act-range=static,group-sizes=none
    SMALL=population=10,generations=4
    python compare.py --model DiT-Digits-Outliers --recipes \\
        $NEAREST,weight-granularity=channel,$STATIC \\
        $NEAREST,$STATIC,group-size=64 \\
        $NEAREST,group-sizes=none,group-size=64 \\
        $NEAREST,$SMALL \\
        qdit:$SMALL

    # a text-to-image pipeline of diffusers, in a folder
    python compare.py --model examples/emoji/pixart --recipes rtn smoothquant ditas ditas-plus

    # the published model at both of its sizes
    python compare.py --model DiT-XL/2 --image-size 256 512 --num-sampling-steps 50 100 \\
        --bits W8A8 W6A8 W4A8 --num-fid-samples 10000 --nproc 8 \\
        --reference VIRTUAL_imagenet256_labeled.npz VIRTUAL_imagenet512.npz
"""
from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import argparse

from cli.parser import Parser, run
from comparison import flags


def main(args: argparse.Namespace) -> None:
    """Fill the table."""
    # Not above: PyTorch takes seconds to load, which help and a wrong flag do not need.
    from comparison.table import compare
    compare(args)


def make_parser() -> Parser:
    """Make the parser of the command line."""
    return flags.make_parser(__doc__)


if __name__ == "__main__":
    run(main, make_parser())
