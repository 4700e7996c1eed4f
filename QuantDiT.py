"""Quantise a DiT: float checkpoint in, quantised checkpoint and a picture out.

    python QuantDiT.py --image-size 256 --seed 1 --model DiT-XL/2 \\
        --act-bit 8 --weight-bit 4 --num-sampling-steps 100
    # bundled, runs on a CPU in a minute
    python QuantDiT.py --model DiT-Digits-Outliers
    python QuantDiT.py --model DiT-Digits-Outliers --recipe smoothquant --smooth-timestep 25
    # any part of any recipe
    python QuantDiT.py --model DiT-Digits-Outliers \\
        --recipe rtn --balance tas --alpha grid --act-granularity token
    # the transformer of a diffusers pipeline, in a folder or on the hub; writes a folder that
    # diffusers loads
    python QuantDiT.py --model FOLDER_OR_ID --prompts prompts.txt --output my-model
    # a checkpoint as the folder of a pipeline
    python QuantDiT.py --path results/model.safetensors --export diffusers
    # what is inside any transformer of diffusers; a config.json is enough
    python QuantDiT.py --model FOLDER_OR_ID --inspect
"""
from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import argparse
from functools import partial

from cli import quantize_flags
from cli.parser import Parser, run


def main(args: argparse.Namespace) -> None:
    """Quantise what the command line says, or print what is inside it."""
    # Not above: PyTorch takes seconds to load, which help and a wrong flag do not need.
    from cli.export import export, export_settings
    from cli.inspect import inspect_settings, print_inspection
    from cli.pipelines import is_pipeline, pipeline_settings, quantize_pipeline
    from cli.quantize import quantize
    from cli.settings import quantize_settings
    if args.inspect and args.path is None:
        print_inspection(inspect_settings(args))
        return
    if args.path is not None:
        work = partial(export, export_settings(args))
    elif is_pipeline(args):
        work = partial(quantize_pipeline, pipeline_settings(args))
    else:
        work = partial(quantize, quantize_settings(args))
    # A mistake leaves its one line and no other, so this comes after the checks.
    quantize_flags.warn_of_ignored_flags(args)
    work()


def make_parser() -> Parser:
    """Make the parser of the command line."""
    return quantize_flags.make_parser(__doc__)


if __name__ == "__main__":
    run(main, make_parser())
