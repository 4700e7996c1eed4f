"""Linears with a quantised weight and an input that stays in floating point."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.layers.buffers import register_buffers
from quant.layers.linear import float32_copy, rescale, split_branch
from quant.layers.quantised import QuantizedLayer

# Of base 256 in the input of a weight-only layer: 24 bits, as many as float32 holds.
DIGITS = 3


class WeightOnly(nn.Module):
    """A linear for inputs (N, I) that stay in floating point, as in adaLN modulation.

    The input enters the product as three base-256 digits, 24 bits in all, as many as float32 holds.
    So the product is one of small integers, exact in float32 below 2^24, and any backend gets the
    same. It is made for few rows, where reading the weight is what takes time.

    Subclasses bring the product.

    Args:
        sums: (O + r,), of the rows of V above R (see ``QuantizedLayer.factored``).
        step: (O,).
        left: (O, r).
        bias: (O,), or None.
    """

    def __init__(self, sums: Tensor, step: Tensor, left: Tensor, bias: Tensor | None):
        super().__init__()
        register_buffers(
            self,
            sums=sums,                # (O + r,) float32
            step=step,                # (O,) float32
            left=left,                # (O, r) float32
            bias=float32_copy(bias),  # (O,) float32, or None for zeros
        )

    def product(self, digits: Tensor) -> Tensor:
        """Multiply ``digits`` (M, I) uint8 by the weight's rows: (M, O + r) float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        digits, grid = to_digits(x)
        products = self.product(digits)
        return from_digits(
            products, grid, self.sums, self.step, self.left, self.bias, x.dtype)


class WeightOnlyLinear(WeightOnly):
    """A weight-only linear whose product is one of float32.

    Args:
        layer: what quantisation found.
        bias: (O,), or None.
    """

    def __init__(self, layer: QuantizedLayer, bias: Tensor | None):
        values, step, left, right = layer.factored()
        weight = torch.cat([values, right])
        super().__init__(weight.sum(1), step, left, bias)
        self.register_buffer("weight", weight)  # (O + r, I) float32

    def product(self, digits: Tensor) -> Tensor:
        return F.linear(digits.float(), self.weight)


# Both directions are operators of their own: otherwise torch.compile repeats this double-precision
# work for every token that the result modulates.

@torch.library.custom_op("ditas::to_digits", mutates_args=())
def to_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Write ``x`` (N, I) in base-256 digits.

    Returns:
        Digits (DIGITS * N, I) uint8, least significant first, and the grid that they count in:
        scale and zero, (2, N, 1) float64.
    """
    values = x.double()
    low = values.amin(-1, keepdim=True).clamp(max=0)
    high = values.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (256 ** DIGITS - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    zero = -(low / scale).round()
    whole = ((values / scale).round() + zero).to(torch.int64)
    digits = torch.cat([(whole >> 8 * i) & 255 for i in range(DIGITS)]).to(torch.uint8)
    return digits, torch.stack([scale, zero])


@to_digits.register_fake
def _(x):
    digits = x.new_empty(DIGITS * x.shape[0], x.shape[1], dtype=torch.uint8)
    return digits, x.new_empty(2, x.shape[0], 1, dtype=torch.float64)


@torch.library.custom_op("ditas::from_digits", mutates_args=())
def from_digits(
        sums: Tensor, grid: Tensor, weight_sums: Tensor, step: Tensor, left: Tensor,
        bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute the outputs (N, O) of a weight-only linear from its products with the digits.

    Args:
        sums: (DIGITS * N, O + r), the products.
        grid: scale and zero of the digits, (2, N, 1).
        weight_sums: (O + r,), of the weight's rows.
        step, bias: (O,); left: (O, r), as in ``rescale``.
        dtype: of the outputs.
    """
    scale, zero = grid.unbind()
    whole = sum(part.double() * 256 ** i for i, part in enumerate(sums.chunk(DIGITS)))
    main, low = split_branch(whole - zero * weight_sums, left)
    return rescale(main, low, step, left.double(), scale, bias).to(dtype)


@from_digits.register_fake
def _(sums, grid, weight_sums, step, left, bias, dtype):
    return sums.new_empty(grid.shape[1], left.shape[0], dtype=dtype)
