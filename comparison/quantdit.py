"""The one place where the comparison meets QuantDiT.py."""
import argparse

import QuantDiT


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line of QuantDiT.py."""
    return QuantDiT.make_parser().parse_args(arguments)


def quantize(arguments: list[str]) -> float:
    """Do in this process what QuantDiT.py does; returns the seconds that quantisation took."""
    return QuantDiT.main(parse_arguments(arguments))
