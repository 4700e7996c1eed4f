"""What an integer product needs of a quantised layer.

With activations ``x ~ sx (qx - zx)`` and a weight ``diag(step) (C + left R)`` of int8 C (O, I) and
R (r, I),

    x W^T = sx * ((A - zx a) * step + (B - zx b) left^T),

    A = qx C^T,  B = qx R^T,  a_o = sum_i C_oi,  b_k = sum_i R_ki

A and B are one product of uint8 codes with int8 weights. An asymmetric 8-bit weight ``q - z`` does
not fit int8; it is stored as ``q - 128``, and the rest, ``128 - z`` per output channel, is one more
column of ``left`` beside a row of ones in R.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

import config
from config import RECIPES, Recipe
from errors import Part, Setting
from quant.layers.quantised import QuantizedLayer
from quant.numerics.spec import OFF_BITS, QuantSpec
from quant.recipe import act_spec, weight_spec

INT8 = torch.iinfo(torch.int8)
# Taken from 8-bit codes, so that they fit int8.
CODE_OFFSET = -INT8.min


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as integers and what multiplies them.

    Attributes:
        codes: C (O, I) int8.
        step: (O,) float32.
        left: (O, r) float32, with the step in it.
        right: R (r, I) int8.
    """

    codes: Tensor
    step: Tensor
    left: Tensor
    right: Tensor

    @property
    def rows(self) -> Tensor:
        """C above R, (O + r, I) int8."""
        return torch.cat([self.codes, self.right])

    @property
    def sums(self) -> Tensor:
        """a and b side by side, (O + r,) float32."""
        return self.rows.sum(1, dtype=torch.int32).float()


@dataclass(frozen=True)
class Nibbles:
    """A weight (O, I) of at most 4 bits in half as many bytes.

    Attributes:
        codes: (O, I/2) uint8; byte j of a row holds input j in its low half and input ``j + I/2``
            in its high one.
        scale, zero: (O, G, 1) int8; the weight's int8 values are ``scale * (code - zero)``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def expand(self) -> Tensor:
        """Compute the weight's int8 values, (O, I)."""
        codes = torch.cat([self.codes & 15, self.codes >> 4], 1).view(torch.int8)
        groups = codes.unflatten(1, (self.zero.shape[1], -1))  # (O, G, g)
        return ((groups - self.zero) * self.scale).flatten(1)


def integer_obstacle(
    recipe: Recipe, weight: QuantSpec, act: QuantSpec
) -> tuple[Part, ...] | None:
    """Say why layers quantised like this cannot run on integers, and what to use instead.

    Returns:
        The parts of the message; None if they can.
    """
    obstacle = _obstacle(recipe, weight, act)
    if obstacle is None:
        return None
    reason, instead = obstacle
    return f"{reason}: ", *(instead or ("use ", Setting("recipe", *integer_recipes())))


def integer_recipes() -> list[str]:
    """Name the recipes whose layers can run on integers."""
    return [name for name, recipe in RECIPES.items()
            if _obstacle(recipe, weight_spec(recipe, config.weight_bit),
                         act_spec(recipe, config.act_bit)) is None]


def _obstacle(
    recipe: Recipe, weight: QuantSpec, act: QuantSpec
) -> tuple[str, tuple[Part, ...]] | None:
    """Find the reason, and what to do; nothing: another recipe is needed."""
    if recipe.act_range == "static" or recipe.scope != "blocks":
        return "static ranges, and layers outside the blocks, are only simulated", ()
    if act.bits == OFF_BITS:
        return ("its activations are not quantised",
                ("quantise with ", Setting("act_bit"), " 4 to 8"))
    if weight.bits == OFF_BITS:
        return ("its weights are not quantised",
                ("quantise with ", Setting("weight_bit"), " 2 to 8"))
    if act.convention in ("free", "clamped"):
        return ("its zero points are no codes of ranges that include 0",
                ("quantise again with ", Setting("zero_point", "widened")))
    if act.granularity not in ("token", "image") or weight.granularity == "strided":
        return "its scales vary along the inputs of one product or with the batch", ()
    if weight.granularity == "group" and weight.convention != "two-level":
        return ("its groups have floating scales, as those of older files",
                ("quantise again with ", Setting("weight_scales", "two-level")))
    return None


def integer_weight(layer: QuantizedLayer) -> IntegerWeight:
    """Bring a layer's weight into the form of an integer product.

    Raises:
        ValueError: the layout has no integer form (see ``integer_obstacle``), or the low-rank
            branch no integer factor.
    """
    values, step, left, right = layer.factored()
    if step is None or not torch.equal(right, right.round()):
        raise ValueError(
            "this weight has no integer form (see quant.integer.weight.integer_obstacle "
            "and LowRankWeight.integer_branch)")
    if values.max() > INT8.max or values.min() < INT8.min:
        quantized = layer.weight.base
        values = quantized.codes.float() - CODE_OFFSET
        rest = (CODE_OFFSET - quantized.zero.reshape(-1, 1)) * step[:, None]  # (O, 1)
        left = torch.cat([left, rest], 1)
        right = torch.cat([right, right.new_ones(1, right.shape[1])])
    return IntegerWeight(values.to(torch.int8), step, left, right.to(torch.int8))


def nibbles(layer: QuantizedLayer) -> Nibbles | None:
    """Pack the codes of a layer at 4 bits; None where they are wider or a row cannot be halved."""
    quantized = layer.weight.base
    codes = quantized.codes
    rows, columns = codes.shape
    if quantized.spec.bits > 4 or columns % 2:
        return None
    low, high = codes.chunk(2, 1)
    zero = quantized.zero.reshape(rows, -1, 1).to(torch.int8)
    scale = torch.ones_like(zero)
    if quantized.step is not None:
        scale = quantized.scale.reshape(rows, -1, 1).to(torch.int8)
    return Nibbles(low | high << 4, scale, zero)
