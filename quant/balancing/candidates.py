"""The quantised weights that the grid search compares (see ``quant.balancing.search``).

They are made anew for every few timesteps rather than kept. This is their definition, for any
device; ``quant.balancing.compiled`` makes the same on a CPU in less time.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import quantize
from quant.weights.two_level import round_to_int8

# Weights quantised at a time: few enough to stay in a CPU's cache between passes.
BLOCK_WEIGHTS = 2 ** 18


@dataclass(frozen=True)
class Candidates:
    """Factors s that divide the input, and the weights that multiply what comes out.

    The weight of a candidate is ``diag(step) values diag(columns)``.

    Attributes:
        factors: (A, I) float32.
        values: (A, O, I) int8 where the layout has such a form, else float32.
        step: (A, O) float32; None for ones, if values are float32.
        sums: (A, O) float32, of values along inputs; None if values are float32.
        columns: (A, I) float32; None for ones.
    """

    factors: Tensor
    values: Tensor
    step: Tensor | None = None
    sums: Tensor | None = None
    columns: Tensor | None = None


def rounded(weight: Tensor, factors: Tensor, spec: QuantSpec) -> Candidates:
    """Quantise ``weight diag(s)`` for every candidate's factors s.

    Two-level scales are approximated by ``round_to_int8``, because their search is slow.

    Args:
        weight: (O, I).
        factors: (A, I).
        spec: how the weight is quantised.

    Raises:
        ValueError: the weight does not divide into groups.
    """
    count = max(1, BLOCK_WEIGHTS // weight.numel())
    if spec.granularity == "strided":
        # Groups span rows, which must then be those of one candidate.
        count = 1
    values = []
    steps = []
    for chunk in factors.split(count):
        rows = (weight * chunk[:, None]).flatten(0, 1)  # (count O, I)
        values_of_rows, step_of_rows = _quantize_rows(rows, spec)
        values.append(values_of_rows)
        steps.append(step_of_rows)
    values = torch.cat(values).view(-1, *weight.shape)  # (A, O, I)
    if steps[0] is None:
        return Candidates(factors, values)
    step = torch.cat(steps).view(-1, len(weight))  # (A, O)
    return Candidates(factors, values, step, values.sum(2, dtype=torch.float32))


def _quantize_rows(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Quantise rows (R, I) of weights.

    Returns:
        int8 values (R, I) and what multiplies each row, (R,), if the layout has such a form;
        else float32 values and None.
    """
    if spec.convention == "two-level":
        return round_to_int8(rows, spec)
    quantized = quantize(rows, spec)
    # Differences of 8-bit codes exceed int8.
    integers = quantized.integers() if spec.bits < 8 else None
    if integers is None:
        return quantized.dequantize(), None
    values, step = integers
    return values.to(torch.int8), step
