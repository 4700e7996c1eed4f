"""What quantisation does to a layer's outputs, for all candidates of the grid search.

This is the definition (see ``quant.balancing.search``), for any device;
``quant.balancing.compiled`` computes the same on a CPU in less than half the time.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.balancing.candidates import Candidates, rounded
from quant.numerics.spec import OFF_BITS, QuantSpec
from quant.numerics.uniform import scale_and_zero, signed_codes_


def squared_errors(
        x: Tensor, y: Tensor, bias: Tensor, candidates: Candidates, act: QuantSpec) -> Tensor:
    """Compute ``|y - bias - Qa(x / s) (diag(step) values diag(columns))^T|^2`` of each candidate.

    Args:
        x: (B, R, I) inputs.
        y: (B, R, O) float outputs.
        bias: (O,).
        candidates: factors s, values, step and columns.
        act: of granularity ``token``, or ``image`` for one range per entry of x.

    Returns:
        (A,) float64.
    """
    weights = candidates.values
    if candidates.step is not None:
        weights = weights * candidates.step[..., None]
    y = y - bias
    ranges = None if act.granularity == "token" else entry_ranges(x, candidates.factors, act)
    buffer = torch.empty_like(x)
    errors = []
    for a, (s, weight) in enumerate(zip(candidates.factors, weights)):
        torch.div(x, s, out=buffer)
        given = None if ranges is None else (ranges[0][a], ranges[1][a])
        scale = _quantize_(buffer, act, given)
        if candidates.columns is not None:
            buffer.mul_(candidates.columns[a])
        difference = torch.matmul(buffer, weight.T).mul_(scale).sub_(y).view(-1)
        errors.append(torch.dot(difference, difference))
    return torch.stack(errors).double()


def entry_ranges(x: Tensor, factors: Tensor, act: QuantSpec) -> tuple[Tensor, Tensor]:
    """Compute scale and zero point of ``x / s`` for all factors, one range per entry of ``x``.

    Args:
        x: (B, R, I).
        factors: (A, I).
        act: the quantiser.

    Returns:
        Scale and zero point, (A, B, 1, 1) each.
    """
    s = factors[:, None, None]  # (A, 1, 1, I)
    # Division keeps order, so the extremes of x / s are among those of x's columns.
    lows = (x.amin(1, keepdim=True) / s).amin(-1, keepdim=True)
    highs = (x.amax(1, keepdim=True) / s).amax(-1, keepdim=True)
    return scale_and_zero(lows, highs, act)


def _quantize_(values: Tensor, act: QuantSpec, given: tuple[Tensor, Tensor] | None) -> Tensor:
    """Replace values (B, R, I) by integers ``q - zero``, in place.

    Args:
        given: scale and zero point, (B, 1, 1); None for those of every token's own range.

    Returns:
        What multiplies the integers, broadcasting with (B, R, 1).
    """
    if act.bits == OFF_BITS:
        return values.new_ones(1)
    if given is None:
        low = values.amin(-1, keepdim=True)
        high = values.amax(-1, keepdim=True)
        given = scale_and_zero(low, high, act)
    scale, zero = given
    signed_codes_(values.div_(scale), zero, act)
    return scale


@dataclass(frozen=True)
class Arithmetic:
    """How the grid search computes.

    Attributes:
        candidates: makes candidates from weight, factors and spec.
        squared_errors: computes (A,) float64 from inputs, outputs, bias, candidates and spec.
    """

    candidates: Callable[[Tensor, Tensor, QuantSpec], Candidates]
    squared_errors: Callable[[Tensor, Tensor, Tensor, Candidates, QuantSpec], Tensor]


DEFINITION = Arithmetic(rounded, squared_errors)
