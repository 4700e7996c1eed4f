"""What quantisation does to a layer's outputs, for all candidates of the grid search (see ``quant.balancing.search``).

``squared_errors`` is the definition in PyTorch, for any device. ``fused_squared_errors`` gives the same on a CPU in less than half the time: what
surrounds the products is one compiled pass each, and weights of small integers are multiplied on int8.
"""
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from quant.balancing.candidates import Candidates, fused_rounded, rounded
from quant.integer.cpu import supported
from quant.numerics.uniform import OFF_BITS, QuantSpec, scale_and_zero, signed_codes_


def squared_errors(x: Tensor, y: Tensor, bias: Tensor, candidates: Candidates, act: QuantSpec) -> Tensor:
    """Squared norms of ``y - bias - Qa(x / s) (diag(step) values diag(columns))^T`` for each candidate, (A,) float64.

    Args:
        x: (B, R, I); y: (B, R, O); bias: (O,).
        act: of granularity ``token``, or ``image`` for one range per entry of x.
    """
    weights = candidates.values if candidates.step is None else candidates.values * candidates.step[..., None]
    y = y - bias
    found, buffer = [], torch.empty_like(x)
    ranges = None if act.granularity == "token" else entry_ranges(x, candidates.factors, act)
    for i, (s, weight) in enumerate(zip(candidates.factors, weights)):
        torch.div(x, s, out=buffer)
        scale = buffer.new_ones(1)
        if act.bits != OFF_BITS:
            if ranges is None:
                scale, zero = scale_and_zero(buffer.amin(-1, keepdim=True), buffer.amax(-1, keepdim=True), act)
            else:
                scale, zero = (values[i] for values in ranges)
            signed_codes_(buffer.div_(scale), zero, act)
        if candidates.columns is not None:
            buffer.mul_(candidates.columns[i])
        difference = torch.matmul(buffer, weight.T).mul_(scale).sub_(y).view(-1)
        found.append(torch.dot(difference, difference))
    return torch.stack(found).double()


def entry_ranges(x: Tensor, factors: Tensor, act: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point (A, B, 1, 1) of ``x / s`` for all factors (A, I) and entries of ``x`` (B, R, I), which have one range each."""
    s = factors[:, None, None]
    lows = (x.amin(1, keepdim=True) / s).amin(-1, keepdim=True)  # division keeps order: from the extremes of X's columns
    highs = (x.amax(1, keepdim=True) / s).amax(-1, keepdim=True)
    return scale_and_zero(lows, highs, act)


def fused_squared_errors(x: Tensor, y: Tensor, bias: Tensor, candidates: Candidates, act: QuantSpec) -> Tensor:
    """As ``squared_errors``, on a CPU; codes may differ where a value lies within a rounding error of the middle between two."""
    from quant.numerics import passes
    passes.use_threads(torch.get_num_threads())
    integer = candidates.values.dtype == torch.int8 and supported()
    factors, inputs, outputs = (each.numpy() for each in (1 / candidates.factors, x.flatten(0, 1), y.flatten(0, 1)))
    bias, top = bias.numpy(), np.float32(act.top)
    ones, zeros = (np.full(max(*inputs.shape, *outputs.shape), each, np.float32) for each in (1, 0))
    step, sums, columns = ((default,) * len(factors) if each is None else each.numpy()
                           for each, default in ((candidates.step, ones), (candidates.sums, zeros), (candidates.columns, ones)))
    if act.granularity == "token":
        low, high = torch.empty(2, len(factors), len(inputs))
        passes.extremes(inputs, factors, low.numpy(), high.numpy())
        scale, zero = (each.numpy() for each in scale_and_zero(low, high, act))  # (A, M)
    else:
        scale, zero = (each.flatten(1).repeat_interleave(x.shape[1], 1).numpy() for each in entry_ranges(x, candidates.factors, act))
    quantized = torch.empty(inputs.shape, dtype=torch.uint8 if integer else torch.float32)
    products = torch.empty(outputs.shape, dtype=torch.int32 if integer else torch.float32)
    quantized_, products_, found = quantized.numpy(), products.numpy(), np.empty((len(factors), len(inputs)), np.float32)
    for i, weight in enumerate(candidates.values):
        if integer:
            passes.codes(inputs, factors[i], scale[i], zero[i], top, quantized_)
            torch._int_mm(quantized, weight.T, out=products)
            passes.squared_errors(products_, sums[i], step[i], scale[i], zero[i], bias, outputs, found[i])
        else:
            passes.fake_quantized(inputs, factors[i], scale[i], zero[i], top, columns[i], quantized_)
            torch.mm(quantized, weight.T.float(), out=products)
            passes.squared_errors(products_, zeros, step[i], ones, zeros, bias, outputs, found[i])
    return torch.from_numpy(found.sum(1, dtype=np.float64))


@dataclass(frozen=True)
class Arithmetic:
    """How the grid search computes: ``candidates`` from weight, factors and spec, ``squared_errors`` from inputs, outputs, bias, candidates and spec."""

    candidates: Callable[[Tensor, Tensor, QuantSpec], Candidates]
    squared_errors: Callable[[Tensor, Tensor, Tensor, Candidates, QuantSpec], Tensor]


DEFINITION = Arithmetic(rounded, squared_errors)
FUSED = Arithmetic(fused_rounded, fused_squared_errors)


def fastest(device: torch.device, act: QuantSpec) -> Arithmetic:
    """``FUSED`` where it can be had (without numba it cannot), else ``DEFINITION``."""
    return FUSED if device.type == "cpu" and act.bits != OFF_BITS and find_spec("numba") is not None else DEFINITION
