"""Linears with a quantised weight and an input that stays in floating point."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.layers.linear import float32_copy, rescale, split_branch
from quant.layers.quantised import QuantizedLayer

DIGITS = 3  # of base 256 in the input of a weight-only layer: 24 bits, as many as float32 holds


class WeightOnly(nn.Module):
    """A linear with a quantised weight and an input (N, I) that stays in floating point: adaLN modulation. Subclasses bring the product.

    The input enters the product as three base-256 digits, 24 bits in all, as many as float32 holds; so the product is one of small
    integers, exact in float32 below 2^24, and any backend gets the same. For few rows, where reading the weight is what takes time.

    Buffers: ``sums`` (O + r,), of the rows of V above R (see ``QuantizedLayer.factored``); the others as in ``QuantLinear``.
    """

    def __init__(self, sums: Tensor, step: Tensor, left: Tensor, bias: Tensor | None):
        super().__init__()
        for name, value in {"sums": sums, "step": step, "left": left, "bias": float32_copy(bias)}.items():
            self.register_buffer(name, value)

    def product(self, digits: Tensor) -> Tensor:
        """Sums of products of ``digits`` (M, I) uint8 with the weight's rows, (M, O + r) float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        digits, scale, zero = to_digits(x)
        return from_digits(self.product(digits), scale, zero, self.sums, self.step, self.left, self.bias, x.dtype)


class WeightOnlyLinear(WeightOnly):
    """In floating point: ``weight`` (O + r, I) float32."""

    def __init__(self, layer: QuantizedLayer, bias: Tensor | None):
        values, step, left, right = layer.factored()
        weight = torch.cat([values, right])
        super().__init__(weight.sum(1), step, left, bias)
        self.register_buffer("weight", weight)

    def product(self, digits: Tensor) -> Tensor:
        return F.linear(digits.float(), self.weight)


# Operators of their own: otherwise torch.compile repeats this double-precision work for every token that the result modulates.

@torch.library.custom_op("ditas::to_digits", mutates_args=())
def to_digits(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` (N, I) as base-256 digits, least significant first, (DIGITS * N, I) uint8; scale and zero (N, 1) float64."""
    values = x.double()
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (256 ** DIGITS - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    zero = -(low / scale).round()
    whole = ((values / scale).round() + zero).to(torch.int64)
    return torch.cat([(whole >> 8 * i) & 255 for i in range(DIGITS)]).to(torch.uint8), scale, zero


@to_digits.register_fake
def _(x):
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float64)
    return x.new_empty(DIGITS * x.shape[0], x.shape[1], dtype=torch.uint8), scale, torch.empty_like(scale)


@torch.library.custom_op("ditas::from_digits", mutates_args=())
def from_digits(sums: Tensor, scale: Tensor, zero: Tensor, weight_sums: Tensor, step: Tensor, left: Tensor, bias: Tensor | None,
                dtype: torch.dtype) -> Tensor:
    """Outputs (N, O) from the sums (DIGITS * N, O + r) of products with the digits."""
    whole = sum(part.double() * 256 ** i for i, part in enumerate(sums.chunk(DIGITS)))
    return rescale(*split_branch(whole - zero * weight_sums, left), step, left.double(), scale, bias).to(dtype)


@from_digits.register_fake
def _(sums, scale, zero, weight_sums, step, left, bias, dtype):
    return sums.new_empty(scale.shape[0], left.shape[0], dtype=dtype)
