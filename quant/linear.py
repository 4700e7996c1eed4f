"""The one quantised layer."""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.lowrank import LowRankWeight
from quant.quantizer import OFF_BITS, QuantSpec, signed_codes

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
MODULATION = "adaLN_modulation.1"
DIGITS = 3  # of base 256 in the input of a weight-only layer: 24 bits, as many as float32 holds


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears a recipe quantises, by state-dict name, in the order in which a forward pass meets them."""
    return {f"blocks.{i}.{name}": block.get_submodule(name) for i, block in enumerate(model.blocks) for name in BLOCK_LINEARS}


def modulation_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears behind every block's adaptive LayerNorms, by state-dict name."""
    return {f"blocks.{i}.{MODULATION}": block.get_submodule(MODULATION) for i, block in enumerate(model.blocks)}


@dataclass(frozen=True)
class QuantizedLayer:
    """What quantisation found for one linear: ``W diag(smooth) ~ weight``.

    Attributes:
        smooth: (I,) float32, divides the input; None for all ones.
        rows: (O,) float32, multiplies the output channels (what folding put there); None for all ones.
    """

    weight: LowRankWeight
    smooth: Tensor | None
    rows: Tensor | None = None

    def factored(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """V (O, I), step (O,), L (O, r) and R (r, I) such that the weight is ``diag(step) V + L R``.

        V holds integers where the layout allows it; elsewhere it is the whole weight, step is None and the rank 0.
        """
        found = self.weight.weight.integers()
        if found is None:
            dense = self.weight.dense()
            empty = dense.new_zeros(len(dense), 0), dense.new_zeros(0, dense.shape[1])
            return (dense if self.rows is None else dense * self.rows[:, None]), None, *empty
        values, step = found
        rows = torch.ones_like(step) if self.rows is None else self.rows
        return values, step * rows, self.weight.left * rows[:, None], self.weight.right

    def divide_rows(self, rows: slice, factors: Tensor) -> "QuantizedLayer":
        """The same with these output channels divided by ``factors``."""
        every = torch.ones(len(self.weight.left), device=factors.device) if self.rows is None else self.rows.clone()
        every[rows] /= factors
        return replace(self, rows=every)


class QuantLinear(nn.Module):
    """``y = Qa(x / s) (W_hat + L R)^T + b`` with simulated quantisation (DiTAS, eq. 3).

    The low-rank branch sees the quantised activation. The floating product is of integer values, as far as the weight's layout has
    them, and scales come after it: sums below 2^24 are exact in float32, so that integer arithmetic gives the same up to the last
    bits. Input (..., T, I) and output (..., T, O) are of type ``dtype``; ranges, codes and what follows the product are float32 work.

    Buffers: ``weight`` (O + r, I) of type ``dtype``, V above R; ``step`` (O,) or None, ``left`` (O, r), ``smooth`` (I,) or None,
    ``bias`` (O,) or None, all float32.
    """

    def __init__(self, layer: QuantizedLayer, bias: Tensor | None, act: QuantSpec, dtype: torch.dtype = torch.float32):
        super().__init__()
        values, step, left, right = layer.factored()
        for name, value in {"weight": torch.cat([values, right]).to(dtype), "step": step, "left": left, "smooth": layer.smooth,
                            "bias": own(bias)}.items():
            self.register_buffer(name, value)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        values, scale = x.float(), None
        if self.smooth is not None:
            values = values / self.smooth
        if self.act.bits != OFF_BITS:
            values, scale, _ = signed_codes(values, self.act)
        sums = F.linear(values.to(x.dtype), self.weight)
        return scaled(sums, self.step, self.left, scale, self.bias).to(x.dtype)


def own(bias: Tensor | None) -> Tensor | None:
    """A float32 copy, which later changes to the linear it came from do not reach."""
    return None if bias is None else bias.detach().float().clone()


def scaled(sums: Tensor, step: Tensor | None, left: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """What follows a product with V above R: ``((sums_V step) + sums_R L^T) scale + bias``.

    Args:
        sums: (..., T, O + r or more); the others as in ``QuantLinear``, None for ones (bias: zeros); scale broadcasts with (..., T, 1).
    """
    rows, rank = left.shape
    y = sums[..., :rows].float() if step is None else sums[..., :rows] * step
    if rank:
        y = y + F.linear(sums[..., rows:rows + rank].to(left.dtype), left)
    if scale is not None:
        y = y * scale
    return y if bias is None else y + bias


class WeightOnly(nn.Module):
    """A linear with a quantised weight and an input (N, I) that stays in floating point: adaLN modulation. Subclasses bring the product.

    The input enters the product as three base-256 digits, 24 bits in all, as many as float32 holds; so the product is one of small
    integers, exact in float32 below 2^24, and any backend gets the same. For few rows, where reading the weight is what takes time.

    Buffers: ``sums`` (O + r,), of the rows of V above R (see ``QuantizedLayer.factored``); the others as in ``QuantLinear``.
    """

    def __init__(self, sums: Tensor, step: Tensor, left: Tensor, bias: Tensor | None):
        super().__init__()
        for name, value in {"sums": sums, "step": step, "left": left, "bias": own(bias)}.items():
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
    return scaled(whole - zero * weight_sums, step, left.double(), scale, bias).to(dtype)


@from_digits.register_fake
def _(sums, scale, zero, weight_sums, step, left, bias, dtype):
    return sums.new_empty(scale.shape[0], left.shape[0], dtype=dtype)
