"""Uniform affine quantisers: one spec, one range rule per convention, codes, fake-quantise, bit packing.

A quantiser maps ``x`` to integer codes ``q`` in [0, 2^bits - 1] and back: ``x ~ scale * (q - zero)``. Which values share a
scale is the *granularity*; every granularity is a view of the tensor and the dimensions reduced in it.
"""
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

OFF_BITS = 16  # an activation bit width of 16 means "not quantised"
WEIGHT_BITS = range(2, 9)
ACT_BITS = (4, 5, 6, 7, 8, OFF_BITS)

_REDUCED = {"tensor": None, "image": (-2, -1), "token": (-1,), "channel": (-1,), "group": (-1,), "strided": (0,)}
GRANULARITIES = tuple(_REDUCED)
CONVENTIONS = ("affine", "two-level", "published")


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantised.

    Attributes:
        bits: code width; 16 switches the quantiser off.
        granularity: what shares a scale. ``tensor``: everything. ``image``: the last two dimensions. ``token`` and
            ``channel``: the last dimension (of an activation, of a weight (O, I)). ``group``: ``group`` consecutive entries
            of the last dimension. ``strided``: the published DiTAS weight layout, ``group`` entries of one input channel
            that lie ``O/group`` rows apart.
        group: entries per group for ``group`` (capped at the row length) and ``strided``.
        convention: ``affine`` widens the range to include 0, divides it by ``2^bits - 1`` and keeps the zero point inside
            the codes, so that 0 is exact. ``two-level`` is the same for weights whose scales are then made integer multiples of
            one per row (``quant.weights.two_level``). ``published`` is DiTAS's code: scale ``(max - min) / 2^bits``, zero point
            rounded but not clamped.

    Raises:
        ValueError: unknown granularity or convention.
    """

    bits: int
    granularity: str
    group: int = 0
    convention: str = "affine"

    def __post_init__(self):
        if self.granularity not in GRANULARITIES or self.convention not in CONVENTIONS:
            raise ValueError(f"unknown quantiser {self.granularity!r}/{self.convention!r}: "
                             f"expected one of {GRANULARITIES} and of {CONVENTIONS}")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 ** self.bits - 1

    def per_step(self) -> "QuantSpec":
        """The same quantiser for (steps, rows, channels) stacks, where one range per tensor is one per step."""
        return replace(self, granularity="image") if self.granularity == "tensor" else self


def grouped(x: Tensor, spec: QuantSpec) -> tuple[Tensor, tuple[int, ...]]:
    """A view of ``x`` and the dimensions of it that share a scale.

    Raises:
        ValueError: the group size does not divide the dimension it is taken from.
    """
    if spec.granularity == "tensor":
        return x, tuple(range(x.dim()))
    if spec.granularity == "group":
        size = min(spec.group, x.shape[-1])
        if x.shape[-1] % size:
            raise ValueError(f"group size {size} does not divide a row of {x.shape[-1]} values")
        x = x.unflatten(-1, (-1, size))
    elif spec.granularity == "strided":
        if x.shape[0] % spec.group:
            raise ValueError(f"strided groups of {spec.group} rows do not divide {x.shape[0]} rows")
        x = x.reshape(spec.group, -1)
    return x, _REDUCED[spec.granularity]


def scale_and_zero(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and (integer-valued) zero point of groups whose smallest and largest values are given.

    A group of one constant value is reproduced exactly under both conventions; an all-zero group gets scale 1.
    In-place operations because this runs in every forward pass.
    """
    if spec.convention != "published":
        low = low.clamp(max=0)
        scale = high.clamp(min=0).sub_(low).mul_(1 / spec.top)  # not a division, which CUDA and torch.compile round differently
    else:
        scale = torch.sub(high, low).div_(spec.top + 1)
        scale = torch.where(scale == 0, torch.maximum(low.abs(), high.abs()), scale)
    scale.masked_fill_(scale == 0, 1.0)
    return scale, torch.div(low, scale).neg_().round_()


def signed_codes_(values: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """``q - zero`` (integer-valued) from values divided by their scale, in place.

    The range is the values' own, so their low end rounds to code 0 and only the top needs a clamp.
    """
    return torch.minimum(values.round_(), spec.top - zero, out=values)


def clip_(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``values.clamp_(low, high)``, which is several times slower where bounds broadcast."""
    return torch.minimum(torch.maximum(values, low, out=values), high, out=values)


@dataclass(frozen=True)
class Grid:
    """The values that codes of groups can stand for: ``scale * v`` with integers v = q - zero from ``low`` to ``high``.

    All are float32 (O, G), except of a single group, which ``select`` gives, (O,). ``code_scale`` is what ``Quantized`` holds as its scale.
    """

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    code_scale: Tensor

    def signed(self, groups: Tensor) -> Tensor:
        """The nearest v of every weight (O, G, g), integer-valued."""
        return clip_((groups / self.scale[..., None]).round_(), self.low[..., None], self.high[..., None])

    def select(self, group: int) -> "Grid":
        return Grid(*(getattr(self, each.name)[:, group].contiguous() for each in fields(self)))


def affine_grid(scale: Tensor, zero: Tensor, spec: QuantSpec) -> Grid:
    """Of one floating scale and zero point per group, (O, G) or with trailing dimensions of size 1."""
    scale, zero = (each.reshape(len(each), -1) for each in (scale, zero))
    return Grid(scale, zero, -zero, spec.top - zero, scale)


@dataclass(frozen=True)
class Quantized:
    """Integer codes with what turns them back into values.

    Attributes:
        codes: uint8, the shape of the quantised tensor.
        scale, zero: float32, the shape of ``grouped`` with reduced dimensions of size 1; ``zero`` is integer-valued.
        spec: the quantiser that made them.
        step: (O, 1) float32 with two-level scales (``quant.weights.two_level``), where ``scale`` is integer-valued too; else None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    spec: QuantSpec
    step: Tensor | None = None

    def integers(self) -> tuple[Tensor, Tensor] | None:
        """Integer-valued weights (O, I) and what each row of them is multiplied by, (O,), float32; None where columns differ in scale."""
        if self.step is None and self.spec.granularity != "channel":
            return None
        view, _ = grouped(self.codes, self.spec)
        if self.step is None:
            return view - self.zero, self.scale.flatten()
        return ((view - self.zero) * self.scale).reshape(self.codes.shape), self.step.flatten()

    def dequantize(self) -> Tensor:
        """The values, float32, the shape of ``codes``."""
        if self.step is not None:
            values, step = self.integers()
            return values * step[:, None]
        view, _ = grouped(self.codes, self.spec)
        return ((view.to(self.scale.dtype) - self.zero) * self.scale).reshape(self.codes.shape)

    def scale_columns(self, factors: Tensor) -> "Quantized":
        """The same codes for ``W diag(factors)``; only for groups that never span input channels (``strided``)."""
        if self.spec.granularity != "strided":
            raise ValueError(f"granularity {self.spec.granularity!r} shares scales across columns")
        return replace(self, scale=(self.scale.reshape(-1, len(factors)) * factors).reshape(self.scale.shape))


def quantize(x: Tensor, spec: QuantSpec) -> Quantized:
    """Quantise a tensor to codes.

    Raises:
        ValueError: ``x`` holds NaN or infinity, or does not divide into groups.
    """
    if not torch.isfinite(x).all():
        raise ValueError("cannot quantise a tensor that holds NaN or infinity")
    view, dims = grouped(x, spec)
    scale, zero = scale_and_zero(view.amin(dims, keepdim=True), view.amax(dims, keepdim=True), spec)
    codes = signed_codes_(view / scale, zero, spec).add_(zero).clamp_(0, spec.top)  # the clamp: a huge published zero point rounds
    return Quantized(codes.to(torch.uint8).reshape(x.shape), scale, zero, spec)


def signed_codes(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """What ``fake_quantize`` multiplies: integer-valued ``q - z`` of the shape of ``x``, their scale, and z, all float32.

    Scale and zero broadcast with x (..., T, I). NaN leads to a scale of NaN.
    """
    view, dims = grouped(x, spec)
    scale, zero = scale_and_zero(view.amin(dims, keepdim=True), view.amax(dims, keepdim=True), spec)
    return signed_codes_(view / scale, zero, spec), scale, zero


def fake_quantize(x: Tensor, spec: QuantSpec) -> Tensor:
    """``dequantize(quantize(x))`` in one go, float32, without the check for NaN (which passes through)."""
    if spec.bits == OFF_BITS:
        return x
    values, scale, _ = signed_codes(x, spec)
    return values.mul_(scale).reshape(x.shape)


