"""Ranges of quantisers: the whole of what they have seen, shrunk (Q-DiT, TFMQ-DM), cut (PTQ4DiT).

For every group of values that share a range, a list of candidate ranges is tried, and the first of
least error is taken. The quantiser turns a range into its parameters; uniform ones (``Affine``) do
so by the convention of their spec.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from quant.numerics.range_search import searched_range
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import Quantized, check_finite, grouped, scale_and_zero, ungrouped

SHRINKS = tuple(1 - 0.001 * i for i in range(100))  # Q-DiT
FAR_SHRINKS = tuple(1 - 0.01 * i for i in range(80))  # TFMQ-DM
SHRINK_NORM = 2.4  # of both, after LAPQ (Nahshan et al., 2021)
PERCENTILES = (0.999, 0.9999, 0.99999)  # PTQ4DiT, after RepQ-ViT

Range = tuple[Tensor, Tensor]  # the lower and upper end of every group


class RangedQuantizer(Protocol):
    """A formula that quantises values of a range: what ``best_range`` needs to try ranges out.

    It holds no range itself. ``quant.weights.rounding.WeightQuantizer`` is something else, a
    function that turns a whole weight into codes, and
    ``quant.activations.quantisers.activation_module`` makes the module that runs when a model is
    sampled.
    """

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        """Compute the parameters of groups of values from ``low`` to ``high``."""

    def round_trip(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Turn values into codes and these back into values."""


@dataclass(frozen=True)
class Affine:
    """The uniform quantiser of a spec as a ``RangedQuantizer``: parameters are scale and zero."""

    spec: QuantSpec

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return scale_and_zero(low, high, self.spec)

    def round_trip(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return static_codes(x, scale, zero, self.spec).mul_(scale)


def static_codes(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Compute ``q - zero`` for a range that ``x`` may exceed on either side; NaN stays NaN.

    Args:
        x: (..., I); scale and zero broadcast with it.

    Returns:
        Integer-valued float32, the shape of ``x``.
    """
    return (x / scale).round_().clamp_(-zero, spec.top - zero)


def _extremes(view: Tensor, dims: tuple[int, ...]) -> Range:
    return view.amin(dims, keepdim=True), view.amax(dims, keepdim=True)


def _whole(view: Tensor, dims: tuple[int, ...]) -> list[Range]:
    return [_extremes(view, dims)]


def _shrunk(shrinks: tuple[float, ...], view: Tensor, dims: tuple[int, ...]) -> list[Range]:
    low, high = _extremes(view, dims)
    return [(low * shrink, high * shrink) for shrink in shrinks]


def _cut(view: Tensor, dims: tuple[int, ...]) -> list[Range]:
    """Cut groups at their (1 - p)- and p-quantiles, for every p of ``PERCENTILES``.

    The quantiles are those of ``torch.quantile``, which the published codes call, without its
    limit of 2^24 values.
    """
    shape = view.amin(dims, keepdim=True).shape
    last = tuple(range(-len(dims), 0))
    values = view.movedim(dims, last).flatten(-len(dims))  # (..., n)
    ordered = values.sort(-1).values
    return [
        (_quantile(ordered, 1 - p).reshape(shape), _quantile(ordered, p).reshape(shape))
        for p in PERCENTILES
    ]


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Interpolate the quantile of rows (..., n), in ascending order, between two values, (...)."""
    last = ordered.shape[-1] - 1
    # In float32, as in torch.quantile: at the far end of a tail it shows.
    rank = float(torch.tensor(share) * last)
    below = int(rank)
    above = min(below + 1, last)
    return torch.lerp(ordered[..., below], ordered[..., above], rank - below)


@dataclass(frozen=True)
class RangeRule:
    """How a range is chosen.

    Attributes:
        candidates: makes the ranges to try, widest first, from a view and the dimensions of it
            that share a range.
        norm: the power of errors whose mean is to be least.
    """

    candidates: Callable[[Tensor, tuple[int, ...]], list[Range]]
    norm: float


# The code of Q-DiT and that of TFMQ-DM both call their shrinks `mse`.
RANGES = {
    "minmax": RangeRule(_whole, 2),
    "shrink": RangeRule(partial(_shrunk, SHRINKS), SHRINK_NORM),
    "shrink-far": RangeRule(partial(_shrunk, FAR_SHRINKS), SHRINK_NORM),
    "percentile": RangeRule(_cut, 2),
}
# How a static range can be chosen; the search is for whole tensors and affine quantisers alone.
TENSOR_RANGES = (*RANGES, "search")


def best_range(
    view: Tensor, dims: tuple[int, ...], quantizer: RangedQuantizer, choice: str
) -> tuple[Tensor, ...]:
    """Find the quantiser's parameters for the first candidate range of least error, per group.

    Args:
        view: float32; ``dims`` of it share a range, and have size 1 in what is returned.
        choice: a key of ``RANGES``.

    Raises:
        ValueError: NaN or infinity, or an unknown choice.
    """
    if choice not in RANGES:
        raise ValueError(f"unknown range {choice!r}: expected one of {tuple(RANGES)}")
    check_finite(view)
    rule = RANGES[choice]
    widest, *others = rule.candidates(view, dims)
    best = quantizer.parameters(*widest)
    if not others:
        return best
    least = _mean_error(view, dims, quantizer, best, rule.norm)
    for low, high in others:
        parameters = quantizer.parameters(low, high)
        error = _mean_error(view, dims, quantizer, parameters, rule.norm)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(torch.where(better, new, old) for new, old in zip(parameters, best))
    return best


def _mean_error(
    view: Tensor,
    dims: tuple[int, ...],
    quantizer: RangedQuantizer,
    parameters: tuple[Tensor, ...],
    norm: float,
) -> Tensor:
    """Average the error's power over each group."""
    error = quantizer.round_trip(view, *parameters).sub_(view)
    return error.abs_().pow_(norm).mean(dims, keepdim=True)


def quantize_range(weight: Tensor, spec: QuantSpec, choice: str) -> Quantized:
    """Quantise a weight to codes, with ranges chosen by a key of ``RANGES``.

    Raises:
        ValueError: NaN or infinity, groups that do not fit, or an unknown choice.
    """
    view, dims = grouped(weight, spec)
    scale, zero = best_range(view, dims, Affine(spec), choice)
    codes = static_codes(view, scale, zero, spec).add_(zero)
    return Quantized(ungrouped(codes.to(torch.uint8), weight.shape), scale, zero, spec)


def tensor_range(sample: Tensor, spec: QuantSpec, choice: str) -> tuple[Tensor, Tensor]:
    """Choose the one range of a static quantiser for a sample of activations of any shape.

    Args:
        choice: one of ``TENSOR_RANGES``.

    Returns:
        Scale and zero point, 0-dim float32.

    Raises:
        ValueError: NaN or infinity, or an unknown choice.
    """
    values = sample.flatten().float()
    if choice == "search":
        check_finite(values)
        return searched_range(values, spec)
    scale, zero = best_range(values, (0,), Affine(spec), choice)
    return scale.squeeze(), zero.squeeze()


def step_ranges(samples: Tensor, spec: QuantSpec, choice: str) -> tuple[Tensor, Tensor]:
    """Choose a range for every step, given samples of activations (steps, ...).

    Args:
        choice: one of ``TENSOR_RANGES``.

    Returns:
        Scales and zero points, (steps,) float32.

    Raises:
        ValueError: NaN or infinity, or an unknown choice.
    """
    rows = samples.flatten(1).float()
    if choice == "search":
        check_finite(rows)
        scales, zeros = zip(*[searched_range(row, spec) for row in rows])
        return torch.stack(scales), torch.stack(zeros)
    scale, zero = best_range(rows, (1,), Affine(spec), choice)
    return scale.squeeze(1), zero.squeeze(1)
