"""The one place where the comparison meets QuantDiT.py."""
import argparse

from cli.quantize import Quantized
from cli.quantize import quantize as quantize_settled
from cli.quantize_flags import make_parser
from cli.settings import quantize_settings


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line of QuantDiT.py."""
    return make_parser("").parse_args(arguments)


def quantize(arguments: list[str]) -> Quantized:
    """Do in this process what QuantDiT.py does."""
    return quantize_settled(quantize_settings(parse_arguments(arguments)))
