"""The one place where the comparison meets QuantDiT.py."""
import argparse

from cli.pipelines import is_pipeline, pipeline_settings, quantize_pipeline
from cli.quantize import QuantizedFile
from cli.quantize import quantize as quantize_settled
from cli.quantize_flags import make_parser
from cli.settings import quantize_settings


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line of QuantDiT.py."""
    return make_parser("").parse_args(arguments)


def quantize(arguments: list[str]) -> QuantizedFile:
    """Do in this process what QuantDiT.py does."""
    args = parse_arguments(arguments)
    if is_pipeline(args):
        return quantize_pipeline(pipeline_settings(args))
    return quantize_settled(quantize_settings(args))
