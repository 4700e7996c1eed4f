"""Uniform affine quantisers: one range rule per convention, codes, grids, fake-quantise.

A quantiser maps ``x`` to integer codes ``q`` in [0, 2^bits - 1], and these back to values:
``x ~ scale * (q - zero)``. Which values share a scale is the *granularity*. Every granularity is a
view of the tensor and the dimensions that are reduced in it.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.numerics.spec import OFF_BITS, REDUCED, QuantSpec


def check_finite(x: Tensor) -> None:
    """Raise a ``ValueError`` if a tensor to be quantised holds NaN or infinity."""
    if not torch.isfinite(x).all():
        raise ValueError("cannot quantise a tensor that holds NaN or infinity")


def check_groups(shape: Sequence[int], spec: QuantSpec) -> None:
    """Raise a ``ValueError`` if groups do not divide the dimension they are taken from."""
    rows, columns = shape[0], shape[-1]
    if spec.granularity == "group" and not spec.tail and columns % min(spec.group, columns):
        raise ValueError(f"group size {spec.group} does not divide a row of {columns} values")
    if spec.granularity == "strided" and rows % spec.group:
        raise ValueError(f"strided groups of {spec.group} rows do not divide {rows} rows")


def grouped(x: Tensor, spec: QuantSpec) -> tuple[Tensor, tuple[int, ...]]:
    """View a tensor so that whatever shares a scale fills dimensions of its own.

    Returns:
        The view, and the dimensions of it that share a scale.

    Raises:
        ValueError: the group size does not divide the dimension it is taken from.
    """
    if spec.granularity == "tensor":
        return x, tuple(range(x.dim()))
    check_groups(x.shape, spec)
    if spec.granularity == "group":
        size = min(spec.group, x.shape[-1])
        missing = -x.shape[-1] % size
        if missing:
            # Repeats of a group's own value move neither end of its range.
            repeats = x[..., -1:].expand(*x.shape[:-1], missing)
            x = torch.cat([x, repeats], -1)
        x = x.unflatten(-1, (-1, size))
    elif spec.granularity == "strided":
        x = x.reshape(spec.group, -1)
    return x, REDUCED[spec.granularity]


def ungrouped(view: Tensor, shape: torch.Size) -> Tensor:
    """Bring a view that ``grouped`` made back into the tensor's own shape."""
    if view.numel() != shape.numel():
        view = view.flatten(-2)[..., :shape[-1]]
    return view.reshape(shape)


def scale_and_zero(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Compute scale and (integer-valued) zero point of groups from their extremes.

    A group of one constant value is reproduced exactly under every convention. An all-zero group
    gets scale 1.

    Args:
        low, high: smallest and largest value of each group.
    """
    # In place, because this runs in every forward pass.
    # Not divisions by the top code: CUDA and torch.compile round these differently.
    if spec.convention in ("affine", "two-level"):
        low = low.clamp(max=0)
        scale = high.clamp(min=0).sub_(low).mul_(1 / spec.top)
    else:
        steps = spec.top + 1 if spec.convention == "published" else spec.top
        scale = torch.sub(high, low).mul_(1 / steps)
        scale = torch.where(scale == 0, torch.maximum(low.abs(), high.abs()), scale)
    scale.masked_fill_(scale == 0, 1.0)
    zero = torch.div(low, scale).neg_().round_()
    return scale, zero.clamp_(0, spec.top) if spec.convention == "clamped" else zero


def signed_codes_(values: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Turn values that were divided by their scale into ``q - zero``, integer-valued, in place.

    The range is the values' own, so their low end rounds to code 0 and only the top needs a clamp,
    unless the zero point itself was clamped.
    """
    values.round_()
    if spec.convention == "clamped":
        return clip_(values, -zero, spec.top - zero)
    return torch.minimum(values, spec.top - zero, out=values)


def clip_(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp in place; ``values.clamp_(low, high)`` is several times slower if bounds broadcast."""
    return torch.minimum(torch.maximum(values, low, out=values), high, out=values)


@dataclass(frozen=True)
class Grid:
    """The values ``scale * v`` that the codes of groups stand for, with integers v = q - zero.

    All are float32, (O, G), or (O,) for the single group that ``select`` takes out.

    Attributes:
        scale: the distance of two neighbouring values.
        zero: the zero point, integer-valued.
        low, high: the smallest and the largest v.
        code_scale: what ``Quantized`` keeps as the scale: of two-level scales the integer part.
    """

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    code_scale: Tensor

    def signed(self, groups: Tensor) -> Tensor:
        """Round weights (O, G, g) to the nearest v, integer-valued."""
        values = (groups / self.scale[..., None]).round_()
        return clip_(values, self.low[..., None], self.high[..., None])

    def select(self, group: int) -> "Grid":
        """Take the grid of a single group out, (O,)."""
        return Grid(
            self.scale[:, group].contiguous(),
            self.zero[:, group].contiguous(),
            self.low[:, group].contiguous(),
            self.high[:, group].contiguous(),
            self.code_scale[:, group].contiguous(),
        )


def affine_grid(scale: Tensor, zero: Tensor, spec: QuantSpec) -> Grid:
    """Build the grid of groups that have a floating scale and a zero point each.

    Args:
        scale, zero: (O, G), or with trailing dimensions of size 1.
    """
    scale = scale.reshape(len(scale), -1)
    zero = zero.reshape(len(zero), -1)
    return Grid(scale, zero, -zero, spec.top - zero, scale)


class Coded:
    """Integer codes with what turns them back into values, however the codes are held.

    Attributes:
        codes: uint8, the shape of the quantised tensor.
        scale, zero: float32, the shape of ``grouped`` with reduced dimensions of size 1; ``zero``
            is integer-valued.
        spec: the quantiser that made them.
        step: (O, 1) float32 with two-level scales (``quant.weights.two_level``), where ``scale``
            is integer-valued too; else None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    spec: QuantSpec
    step: Tensor | None

    def integers(self) -> tuple[Tensor, Tensor] | None:
        """Split a weight (O, I) into integer values and one float32 multiplier per row.

        Returns:
            Integer-valued weights (O, I) and multipliers (O,); None where columns differ in scale.
        """
        if self.step is None and self.spec.granularity != "channel":
            return None
        codes = self.codes
        view, _ = grouped(codes, self.spec)
        if self.step is None:
            return view - self.zero, self.scale.flatten()
        values = (view - self.zero).mul_(self.scale)
        return values.reshape(codes.shape), self.step.flatten()

    def dequantize(self) -> Tensor:
        """Turn the codes back into values, float32, the shape of ``codes``."""
        if self.step is not None:
            values, step = self.integers()
            return values * step[:, None]
        codes = self.codes
        view, _ = grouped(codes, self.spec)
        values = (view.to(self.scale.dtype) - self.zero) * self.scale
        return ungrouped(values, codes.shape)

    def scale_columns(self, factors: Tensor) -> "Quantized":
        """Multiply input channels by ``factors`` (I,) through the scales, without a new code.

        Raises:
            ValueError: groups span input channels: all granularities but ``strided``.
        """
        if self.spec.granularity != "strided":
            raise ValueError(f"granularity {self.spec.granularity!r} shares scales across columns")
        scale = self.scale
        scaled = (scale.reshape(-1, len(factors)) * factors).reshape(scale.shape)
        return Quantized(self.codes, scaled, self.zero, self.spec, self.step)


@dataclass(frozen=True)
class Quantized(Coded):
    """A quantised tensor whose codes are a tensor of their own (see ``Coded``)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    spec: QuantSpec
    step: Tensor | None = None


def quantize(x: Tensor, spec: QuantSpec) -> Quantized:
    """Quantise a tensor to codes, in ranges that its groups fill.

    Raises:
        ValueError: ``x`` holds NaN or infinity, or does not divide into groups.
    """
    check_finite(x)
    values, scale, zero = signed_codes(x, spec)
    # The clamp, because a published zero point can be so large that adding it rounds.
    codes = values.add_(zero).clamp_(0, spec.top)
    return Quantized(ungrouped(codes.to(torch.uint8), x.shape), scale, zero, spec)


def signed_codes(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the codes of a tensor, less their zero point, in ranges that its groups fill.

    Returns:
        Integer-valued ``q - zero``, scale and zero, float32, in the view of ``grouped``. Scale and
        zero broadcast with the codes. NaN leads to a scale of NaN.
    """
    view, dims = grouped(x, spec)
    low = view.amin(dims, keepdim=True)
    high = view.amax(dims, keepdim=True)
    scale, zero = scale_and_zero(low, high, spec)
    return signed_codes_(view / scale, zero, spec), scale, zero


def fake_quantize(x: Tensor, spec: QuantSpec) -> Tensor:
    """Quantise and dequantise in one go, float32; NaN passes through instead of being refused."""
    if spec.bits == OFF_BITS:
        return x
    values, scale, _ = signed_codes(x, spec)
    return ungrouped(values.mul_(scale), x.shape)
