"""Ranges of uniform quantisers narrower than the data: shrunk (Q-DiT) or cut at percentiles (PTQ4DiT), whichever errs least.

Every function searches one list of candidates per group of values that share a scale. As everywhere, a range includes 0 and
the zero point is one of the codes.
"""
from collections.abc import Iterable

import torch
from torch import Tensor

from quant.quantizer import Quantized, QuantSpec, grouped, scale_and_zero

SHRINKS = tuple(1 - 0.001 * i for i in range(100))  # Q-DiT
SHRINK_NORM = 2.4  # after LAPQ (Nahshan et al., 2021)
PERCENTILES = (0.999, 0.9999, 0.99999)  # PTQ4DiT, after RepQ-ViT


def static_codes(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """``q - zero`` (integer-valued, float32) for a range that ``x`` may exceed on either side; NaN stays NaN.

    Args:
        x: (..., I); scale and zero broadcast with it.
    """
    return (x / scale).round_().clamp_(-zero, spec.top - zero)


def minmax_range(view: Tensor, dims: tuple[int, ...], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point for the whole range of the values; as the other ranges, of the shape of ``view`` with ``dims`` of size 1."""
    return scale_and_zero(view.amin(dims, keepdim=True), view.amax(dims, keepdim=True), spec)


def shrunk_range(view: Tensor, dims: tuple[int, ...], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The whole range times the first of ``SHRINKS`` with the least mean ``|error|^2.4`` (Q-DiT, Chen et al., 2025: its ``mse``)."""
    low, high = view.amin(dims, keepdim=True), view.amax(dims, keepdim=True)
    return _best(view, dims, spec, ((low * shrink, high * shrink) for shrink in SHRINKS), SHRINK_NORM)


def percentile_range(view: Tensor, dims: tuple[int, ...], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """From the (1 - p)- to the p-quantile, p the first of ``PERCENTILES`` with the least mean squared error (PTQ4DiT, Wu et al., 2024).

    Quantiles are those of ``torch.quantile``, which the published code calls, without its limit of 2^24 values.
    """
    shape = view.amin(dims, keepdim=True).shape
    ordered = view.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).sort(-1).values  # (..., n)
    cuts = ((_quantile(ordered, 1 - p).reshape(shape), _quantile(ordered, p).reshape(shape)) for p in PERCENTILES)
    return _best(view, dims, spec, cuts, 2)


RANGES = {"minmax": minmax_range, "shrink": shrunk_range, "percentile": percentile_range}


def quantize_range(weight: Tensor, spec: QuantSpec, choice: str) -> Quantized:
    """``quantize`` with the range chosen by a key of ``RANGES``.

    Raises:
        ValueError: NaN or infinity, groups that do not fit, or an unknown choice.
    """
    view, dims = grouped(weight, spec)
    scale, zero = _range(view, dims, spec, choice)
    codes = static_codes(view, scale, zero, spec).add_(zero)
    return Quantized(codes.to(torch.uint8).reshape(weight.shape), scale, zero, spec)


def tensor_range(sample: Tensor, spec: QuantSpec, choice: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point, 0-dim float32, of a static quantiser of one range for a sample of activations of any shape.

    Raises:
        ValueError: NaN or infinity, or an unknown choice (expected is a key of ``RANGES``).
    """
    scale, zero = _range(sample.flatten().float(), (0,), spec, choice)
    return scale.squeeze(), zero.squeeze()


def _range(view: Tensor, dims: tuple[int, ...], spec: QuantSpec, choice: str) -> tuple[Tensor, Tensor]:
    if choice not in RANGES:
        raise ValueError(f"unknown range {choice!r}: expected one of {tuple(RANGES)}")
    if not torch.isfinite(view).all():
        raise ValueError("cannot quantise a tensor that holds NaN or infinity")
    return RANGES[choice](view, dims, spec)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Of rows (..., n) in ascending order, (...), on the straight line between two of the values."""
    rank = float(torch.tensor(share) * (ordered.shape[-1] - 1))  # float32, as in torch.quantile: at the far end of a tail it shows
    below = int(rank)
    above = min(below + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], rank - below)


def _best(view: Tensor, dims: tuple[int, ...], spec: QuantSpec, ranges: Iterable[tuple[Tensor, Tensor]], norm: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the first of the (low, high) pairs whose mean ``|error|^norm`` is least, group by group."""
    best = None
    for low, high in ranges:
        scale, zero = scale_and_zero(low, high, spec)
        error = static_codes(view, scale, zero, spec).mul_(scale).sub_(view).abs_().pow_(norm).mean(dims, keepdim=True)
        found = error, scale, zero
        best = found if best is None else tuple(torch.where(error < best[0], new, old) for new, old in zip(found, best))
    return best[1:]
