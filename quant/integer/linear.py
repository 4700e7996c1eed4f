"""Integer counterparts of ``QuantLinear``, same forward signature: activation codes, product of integers, one epilogue.

Here the exact reference in plain PyTorch. A backend brings another product; codes and sums, once rounded to float32, are the same in all.
"""
import torch
from torch import Tensor, nn

from quant.integer.weight import IntegerWeight
from quant.layers.linear import float32_copy, rescale, split_branch
from quant.numerics.uniform import QuantSpec, signed_codes


class IntegerLinear(nn.Module):
    """``y = sx ((A - zx a) step + (B - zx b) left^T) + bias`` (see ``quant.integer.weight``), around a product that subclasses bring.

    Input (..., T, I), output (..., T, O), both float32 or bfloat16; everything between codes and output is float32, because
    the correction takes a difference of large sums.

    Buffers: ``smooth`` (I,) or None, ``step`` (O,), ``sums`` (O + r,) of a and b, ``left`` (O, r), ``bias`` (O,) or None, float32.
    """

    def __init__(self, weight: IntegerWeight, bias: Tensor | None, smooth: Tensor | None, act: QuantSpec):
        super().__init__()
        for name, value in {"smooth": smooth, "step": weight.step, "sums": weight.sums, "left": weight.left,
                            "bias": float32_copy(bias)}.items():
            self.register_buffer(name, value)
        self.act = act

    def product(self, codes: Tensor) -> Tensor:
        """A and B side by side: sums of products of ``codes`` (M, I) uint8 with all int8 rows, (M, O + r) float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        values = x.float() if self.smooth is None else x.float() / self.smooth
        signed, scale, zero = signed_codes(values, self.act)
        codes = (signed + zero).to(torch.uint8)
        products = split_branch(self.product(codes.flatten(0, -2)).unflatten(0, x.shape[:-1]), self.left)
        sums, low = (each - zero * offset for each, offset in zip(products, split_branch(self.sums, self.left)))  # apart, so that each fuses with what follows
        return rescale(sums, low, self.step, self.left, scale, self.bias).to(x.dtype)


class ReferenceLinear(IntegerLinear):
    """Exact on any device: sums of integers in float64, which holds every integer below 2^53."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None, smooth: Tensor | None, act: QuantSpec):
        super().__init__(weight, bias, smooth, act)
        self.register_buffer("weight", torch.cat([weight.codes, weight.right]))

    def product(self, codes: Tensor) -> Tensor:
        return (codes.double() @ self.weight.double().T).float()
