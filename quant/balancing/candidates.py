"""The quantised weights that the grid search compares (see ``quant.balancing.search``), made anew for every few timesteps rather than kept.

``rounded`` is the definition in PyTorch, for any device; ``fused_rounded`` gives the same on a CPU, two-level layouts in a quarter of the time.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quant.numerics.uniform import QuantSpec, grouped, quantize
from quant.weights.two_level import round_to_int8

BLOCK = 2 ** 18  # weights quantised at a time: few enough to stay in a CPU's cache between passes


@dataclass(frozen=True)
class Candidates:
    """Factors s (A, I) that divide the input, and the weights for what comes out: ``diag(step) values diag(columns)``.

    Attributes:
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
    """``Q(weight diag(s))`` for a weight (O, I) and all factors s (A, I); in place of two-level scales, whose search takes long, ``round_to_int8``."""
    apart = spec.granularity == "strided"  # groups span rows
    size = 1 if apart else max(1, BLOCK // weight.numel())
    parts = [_rows((weight * s[:, None]).flatten(0, 1), spec) for s in factors.split(size)]
    values, step = (None if each[0] is None else torch.cat(each) for each in zip(*parts))
    values = values.view(-1, *weight.shape)
    return Candidates(factors, values) if step is None else Candidates(factors, values, step.view(-1, len(weight)), values.sum(2, dtype=torch.float32))


def fused_rounded(weight: Tensor, factors: Tensor, spec: QuantSpec) -> Candidates:
    """As ``rounded``, on a CPU; values are a transposed view.

    Raises:
        ValueError: the weight does not divide into groups.
    """
    if spec.convention != "two-level":
        return rounded(weight, factors, spec)
    from quant.numerics import passes
    passes.use_threads(torch.get_num_threads())
    size, by_input = grouped(weight, spec)[0].shape[-1], weight.T.contiguous()
    values, (step, sums) = torch.empty(len(factors), *by_input.shape, dtype=torch.int8), torch.empty(2, len(factors), len(weight))
    passes.round_to_int8(by_input.numpy(), factors.numpy(), size, np.float32(spec.top), values.numpy(), step.numpy(), sums.numpy())
    return Candidates(factors, values.transpose(1, 2), step, sums)


def _rows(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Rows quantised: int8 values and what multiplies each row, (O,), if the layout has such a form; else values and None."""
    if spec.convention == "two-level":
        return round_to_int8(weight, spec)
    quantized = quantize(weight, spec)
    found = quantized.integers() if spec.bits < 8 else None  # differences of 8-bit codes exceed int8
    return (quantized.dequantize(), None) if found is None else (found[0].to(torch.int8), found[1])
