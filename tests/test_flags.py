"""Command lines are read before PyTorch is loaded; their choices are those of the tables."""
import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import QuantDiT
from cli import recipe_flags
from evaluation.networks import FEATURES
from quant.numerics.ranges import RANGES, TENSOR_RANGES
from quant.weights.low_rank import SOLVERS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script", ["QuantDiT", "sample_merge_TAS", "compare", "evaluate"])
def test_help_and_wrong_flags_do_not_wait_for_pytorch(script):
    program = f"""
import sys
import {script} as script
script.make_parser().format_help()
assert "torch" not in sys.modules
script.make_parser().parse_args(["--nonsense"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "error: " in done.stderr


def choices_of(parser: argparse.ArgumentParser, flag: str) -> set[str]:
    return set(next(action.choices for action in parser._actions if flag in action.option_strings))


def test_choices_are_those_of_the_tables_that_they_choose_from():
    assert set(recipe_flags.RANGES) == set(RANGES)
    assert {*recipe_flags.RANGES, "search"} == set(TENSOR_RANGES)
    assert choices_of(QuantDiT.make_parser(), "--svd") == set(SOLVERS)
    assert choices_of(evaluate.make_parser(), "--features") == set(FEATURES)
