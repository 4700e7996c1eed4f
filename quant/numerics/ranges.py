"""Ranges of quantisers: the whole of what they have seen, shrunk (Q-DiT) or cut at percentiles (PTQ4DiT), whichever errs least.

A list of candidate ranges is searched per group of values that share one; what a range means is the quantiser's affair. For
affine ones (``Affine``), as everywhere, it includes 0 and the zero point is one of the codes.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant.numerics.uniform import Quantized, QuantSpec, grouped, scale_and_zero

SHRINKS = tuple(1 - 0.001 * i for i in range(100))  # Q-DiT
SHRINK_NORM = 2.4  # after LAPQ (Nahshan et al., 2021)
PERCENTILES = (0.999, 0.9999, 0.99999)  # PTQ4DiT, after RepQ-ViT


class RangedQuantizer(Protocol):
    """Something with a range."""

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        """Its parameters, for groups of values from ``low`` to ``high``."""

    def round_trip(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Values that became codes and back."""


@dataclass(frozen=True)
class Affine:
    """The uniform quantiser of a spec; parameters are scale and zero point."""

    spec: QuantSpec

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return scale_and_zero(low, high, self.spec)

    def round_trip(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return static_codes(x, scale, zero, self.spec).mul_(scale)


def static_codes(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """``q - zero`` (integer-valued, float32) for a range that ``x`` may exceed on either side; NaN stays NaN.

    Args:
        x: (..., I); scale and zero broadcast with it.
    """
    return (x / scale).round_().clamp_(-zero, spec.top - zero)


def _whole(view: Tensor, dims: tuple[int, ...]) -> Iterable[tuple[Tensor, Tensor]]:
    yield view.amin(dims, keepdim=True), view.amax(dims, keepdim=True)


def _shrunk(view: Tensor, dims: tuple[int, ...]) -> Iterable[tuple[Tensor, Tensor]]:
    (low, high), = _whole(view, dims)
    return ((low * shrink, high * shrink) for shrink in SHRINKS)


def _cut(view: Tensor, dims: tuple[int, ...]) -> Iterable[tuple[Tensor, Tensor]]:
    """From the (1 - p)- to the p-quantile: those of ``torch.quantile``, which the published codes call, without its limit of 2^24 values."""
    shape = view.amin(dims, keepdim=True).shape
    ordered = view.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).sort(-1).values  # (..., n)
    return ((_quantile(ordered, 1 - p).reshape(shape), _quantile(ordered, p).reshape(shape)) for p in PERCENTILES)


# How a range is chosen: among which candidates, and the power of errors whose mean is to be least (for ``shrink`` Q-DiT's: its code's ``mse``).
RANGES = {"minmax": (_whole, 2), "shrink": (_shrunk, SHRINK_NORM), "percentile": (_cut, 2)}


def best_range(view: Tensor, dims: tuple[int, ...], quantiser: RangedQuantizer, choice: str) -> tuple[Tensor, ...]:
    """The quantiser's parameters for the first of the candidate ranges that errs least, group by group.

    Args:
        view: float32; ``dims`` of it share a range, and have size 1 in what is returned.
        choice: a key of ``RANGES``.

    Raises:
        ValueError: NaN or infinity, or an unknown choice.
    """
    if choice not in RANGES:
        raise ValueError(f"unknown range {choice!r}: expected one of {tuple(RANGES)}")
    if not torch.isfinite(view).all():
        raise ValueError("cannot quantise a tensor that holds NaN or infinity")
    candidates, norm = RANGES[choice]
    ranges, best = list(candidates(view, dims)), None
    if len(ranges) == 1:
        return quantiser.parameters(*ranges[0])
    for low, high in ranges:
        parameters = quantiser.parameters(low, high)
        error = quantiser.round_trip(view, *parameters).sub_(view).abs_().pow_(norm).mean(dims, keepdim=True)
        found = error, *parameters
        best = found if best is None else tuple(torch.where(error < best[0], new, old) for new, old in zip(found, best))
    return best[1:]


def quantize_range(weight: Tensor, spec: QuantSpec, choice: str) -> Quantized:
    """``quantize`` with the range chosen by a key of ``RANGES``.

    Raises:
        ValueError: NaN or infinity, groups that do not fit, or an unknown choice.
    """
    view, dims = grouped(weight, spec)
    scale, zero = best_range(view, dims, Affine(spec), choice)
    codes = static_codes(view, scale, zero, spec).add_(zero)
    return Quantized(codes.to(torch.uint8).reshape(weight.shape), scale, zero, spec)


def tensor_range(sample: Tensor, spec: QuantSpec, choice: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point, 0-dim float32, of a static quantiser of one range for a sample of activations of any shape.

    Raises:
        ValueError: NaN or infinity, or an unknown choice (expected is a key of ``RANGES``).
    """
    scale, zero = best_range(sample.flatten().float(), (0,), Affine(spec), choice)
    return scale.squeeze(), zero.squeeze()


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Of rows (..., n) in ascending order, (...), on the straight line between two of the values."""
    rank = float(torch.tensor(share) * (ordered.shape[-1] - 1))  # float32, as in torch.quantile: at the far end of a tail it shows
    below = int(rank)
    above = min(below + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], rank - below)
