"""What an integer product needs of a quantised layer.

With activations ``x ~ sx (qx - zx)`` and a weight ``diag(step) (C + left R)`` of int8 C (O, I) and R (r, I),

    x W^T = sx * ((A - zx a) * step + (B - zx b) left^T),    A = qx C^T,  B = qx R^T,  a_o = sum_i C_oi,  b_k = sum_i R_ki

A and B are one product of uint8 codes with int8 weights. An asymmetric 8-bit weight ``q - z`` does not fit int8; it is stored as
``q - 128``, and the rest, ``128 - z`` per output channel, is one more column of ``left`` beside a row of ones in R.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.linear import QuantizedLayer
from quant.quantizer import OFF_BITS, Quantized, QuantSpec


@dataclass(frozen=True)
class IntegerWeight:
    """``codes`` (O, I) int8, ``step`` (O,) float32, ``left`` (O, r) float32 with the step in it, ``right`` (r, I) int8."""

    codes: Tensor
    step: Tensor
    left: Tensor
    right: Tensor

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """``a`` (O,) and ``b`` (r,), float32."""
        return self.codes.sum(1, dtype=torch.int32).float(), self.right.sum(1, dtype=torch.int32).float()


@dataclass(frozen=True)
class Nibbles:
    """A weight (O, I) of at most 4 bits in half as many bytes.

    Attributes:
        codes: (O, I/2) uint8; byte j of a row holds input j in its low half and input ``j + I/2`` in its high one.
        scale, zero: (O, G, 1) int8; the weight's int8 values are ``scale * (code - zero)``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def expand(self) -> Tensor:
        """(O, I) int8."""
        codes = torch.cat([self.codes & 15, self.codes >> 4], 1).view(torch.int8)
        return ((codes.unflatten(1, (self.zero.shape[1], -1)) - self.zero) * self.scale).flatten(1)


def why_not(layers: dict[str, QuantizedLayer], act: QuantSpec) -> str | None:
    """Why these layers cannot run on integers, and what to use instead; None if they can."""
    weight = next(iter(layers.values())).weight.weight
    if act.bits == OFF_BITS:
        return "its activations are not quantised (--act-bit 16): quantise with --act-bit 4 to 8"
    if act.granularity not in ("token", "image") or weight.spec.granularity == "strided":
        return "scales of the published layout vary along the inputs of one product and with the batch: use recipe ditas, rtn or smoothquant"
    if weight.spec.granularity == "group" and weight.step is None:
        return "its groups have floating scales (an older file, or --weight-scales float): quantise again with --weight-scales two-level"
    return None


def integer_weight(layer: QuantizedLayer) -> IntegerWeight:
    """Raises:
        ValueError: the layout has no integer form (see ``why_not``).
    """
    quantized, left, right = layer.weight.weight, layer.weight.left, layer.weight.right
    values, step = _values(quantized)
    if values.max() > 127 or values.min() < -128:
        zero = quantized.zero.reshape(-1, 1)
        values = quantized.codes.to(torch.int16) - 128
        left = torch.cat([left, (128 - zero) * step[:, None]], 1)
        right = torch.cat([right, torch.ones_like(right[:1]) if len(right) else right.new_ones(1, right.shape[1])])
    if layer.rows is not None:
        step, left = step * layer.rows, left * layer.rows[:, None]
    if not torch.equal(right, right.round()):
        raise ValueError("the low-rank branch has no integer factor: quantise again with this QuantDiT.py")
    return IntegerWeight(values.to(torch.int8), step, left, right.to(torch.int8))


def _values(quantized: Quantized) -> tuple[Tensor, Tensor]:
    """``q - z``, times the integer scale of its group if it has one, (O, I) int16, and what is left of the scale, (O,) float32."""
    if quantized.step is not None:
        groups = (quantized.codes.unflatten(1, (quantized.scale.shape[1], -1)).to(torch.int16) - quantized.zero.to(torch.int16))
        return (groups * quantized.scale.to(torch.int16)).flatten(1), quantized.step.flatten()
    if quantized.spec.granularity != "channel":
        raise ValueError(f"granularity {quantized.spec.granularity!r} with floating scales has no integer form")
    return quantized.codes.to(torch.int16) - quantized.zero.to(torch.int16), quantized.scale.flatten()


def nibbles(layer: QuantizedLayer) -> Nibbles | None:
    """The codes of a layer packed at 4 bits; None where they are wider or a row cannot be halved."""
    quantized = layer.weight.weight
    rows, columns = quantized.codes.shape
    if quantized.spec.bits > 4 or columns % 2:
        return None
    low, high = quantized.codes.chunk(2, 1)
    zero = quantized.zero.reshape(rows, -1, 1).to(torch.int8)
    scale = torch.ones_like(zero) if quantized.step is None else quantized.scale.to(torch.int8)
    return Nibbles(low | high << 4, scale, zero)
