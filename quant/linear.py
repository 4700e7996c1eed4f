"""The one quantised layer."""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.activation import Activation, Clock, quantiser
from quant.lowrank import LowRankWeight

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
MODULATION = "adaLN_modulation.1"
PATCHES = "x_embedder.proj"
SCOPES = ("blocks", "adaln", "all")
DIGITS = 3  # of base 256 in the input of a weight-only layer: 24 bits, as many as float32 holds


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The four linears of every block, by state-dict name, in the order in which a forward pass meets them."""
    return {f"blocks.{i}.{name}": block.get_submodule(name) for i, block in enumerate(model.blocks) for name in BLOCK_LINEARS}


def modulation_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears behind every block's adaptive LayerNorms, by state-dict name."""
    return {f"blocks.{i}.{MODULATION}": block.get_submodule(MODULATION) for i, block in enumerate(model.blocks)}


def scope_linears(model: nn.Module, scope: str) -> dict[str, nn.Module]:
    """What a recipe of this scope quantises, by state-dict name.

    ``blocks``: the four linears of every block; ``adaln``: its modulation too; ``all``: every linear and the patch embedding,
    a convolution whose patches do not overlap, which is a linear of patches.
    """
    if scope == "blocks":
        return block_linears(model)
    if scope == "adaln":
        return modulation_linears(model) | block_linears(model)
    outer = (PATCHES, "t_embedder.mlp.0", "t_embedder.mlp.2")
    last = (f"final_layer.{MODULATION}", "final_layer.linear")
    return {name: model.get_submodule(name) for name in outer} | scope_linears(model, "adaln") | {name: model.get_submodule(name) for name in last}


def timed(name: str) -> bool:
    """Whether the input of this layer is a vector per image that comes from the timestep embedding."""
    return name.endswith(MODULATION) or name.startswith("t_embedder.")


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear or patch convolution as (O, I)."""
    return module.weight.flatten(1)


def as_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a linear or patch convolution as (N, T, I)."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(x, module.kernel_size, stride=module.stride).transpose(1, 2)
    return x if x.dim() == 3 else x.unsqueeze(1)


@dataclass(frozen=True)
class QuantizedLayer:
    """What quantisation found for one linear: ``W diag(smooth) ~ weight``.

    Attributes:
        act: how its input is quantised; None leaves it in floating point.
        smooth: (I,) float32, divides the input; None for all ones.
        rows: (O,) float32, multiplies the output channels (what folding put there); None for all ones.
        shift: (I,) float32, is added to the input before it is divided, and its effect taken from the output; None for zeros.
    """

    weight: LowRankWeight
    act: Activation | None
    smooth: Tensor | None = None
    rows: Tensor | None = None
    shift: Tensor | None = None

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

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """What to add to the product in place of the linear's bias (O,): the effect of the shift is taken out."""
        if self.shift is None:
            return bias
        offset = self.weight.dense() @ (self.shift if self.smooth is None else self.shift / self.smooth)
        if self.rows is not None:
            offset = offset * self.rows
        return -offset if bias is None else bias - offset

    def divide_rows(self, rows: slice, factors: Tensor) -> "QuantizedLayer":
        """The same with these output channels divided by ``factors``."""
        every = torch.ones(len(self.weight.left), device=factors.device) if self.rows is None else self.rows.clone()
        every[rows] /= factors
        return replace(self, rows=every)


class QuantLinear(nn.Module):
    """``y = Qa((x + z) / s) (W_hat + L R)^T + b`` with simulated quantisation (DiTAS, eq. 3; z = 0 there).

    The low-rank branch sees the quantised activation. The floating product is of integer values, as far as the weight's layout has
    them, and scales come after it: sums below 2^24 are exact in float32, so that integer arithmetic gives the same up to the last
    bits. Input (..., T, I) and output (..., T, O) are of type ``dtype``; ranges, codes and what follows the product are float32 work.

    Buffers: ``weight`` (O + r, I) of type ``dtype``, V above R; ``step`` (O,) or None, ``left`` (O, r), ``shift`` and ``smooth`` (I,)
    or None, ``bias`` (O,) or None, all float32.
    """

    def __init__(self, layer: QuantizedLayer, bias: Tensor | None, dtype: torch.dtype = torch.float32, clock: Clock | None = None):
        super().__init__()
        values, step, left, right = layer.factored()
        for name, value in {"weight": torch.cat([values, right]).to(dtype), "step": step, "left": left, "shift": layer.shift, "smooth": layer.smooth,
                            "bias": own(bias)}.items():
            self.register_buffer(name, value)
        self.act = quantiser(layer.act, clock)

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        if self.shift is not None:
            values = values + self.shift
        if self.smooth is not None:
            values = values / self.smooth
        values, scale = self.act(values)
        sums, low = parted(F.linear(values.to(x.dtype), self.weight), self.left)
        return scaled(sums, low, self.step, self.left, scale, self.bias).to(x.dtype)


class PatchLinear(nn.Module):
    """A patch convolution computed by a linear of patches: (N, C, H, W) to (N, D, H / p, W / p)."""

    def __init__(self, linear: nn.Module, patch: tuple[int, int]):
        super().__init__()
        self.linear, self.patch = linear, patch

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (N, T, C p p)
        return self.linear(patches).transpose(1, 2).unflatten(2, (x.shape[2] // self.patch[0], -1))


def own(bias: Tensor | None) -> Tensor | None:
    """A float32 copy, which later changes to the linear it came from do not reach."""
    return None if bias is None else bias.detach().float().clone()


def parted(sums: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Products (..., O + r or more) with V above R, apart: (..., O) and (..., r), for ``left`` (O, r)."""
    rows, rank = left.shape
    return sums[..., :rows], sums[..., rows:rows + rank]


def scaled(sums: Tensor, low: Tensor, step: Tensor | None, left: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """What follows products with V and R: ``(sums step + low L^T) scale + bias``.

    Args:
        sums: (..., T, O); low: (..., T, r); the others as in ``QuantLinear``, None for ones (bias: zeros); scale broadcasts with (..., T, 1).
    """
    y = sums.float() if step is None else sums * step
    if left.shape[1]:
        y = y + F.linear(low.to(left.dtype), left)
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
    return scaled(*parted(whole - zero * weight_sums, left), step, left.double(), scale, bias).to(dtype)


@from_digits.register_fake
def _(sums, scale, zero, weight_sums, step, left, bias, dtype):
    return sums.new_empty(scale.shape[0], left.shape[0], dtype=dtype)
