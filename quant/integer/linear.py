"""Integer counterparts of ``QuantLinear``: activation codes, a product of integers, one epilogue.

Here is the exact reference in plain PyTorch. A backend brings another product; codes and sums, once
rounded to float32, are the same in all.
"""
import torch
from torch import Tensor, nn

from quant.integer.weight import IntegerWeight
from quant.layers.buffers import register_buffers
from quant.layers.linear import float32_copy, rescale, split_branch
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import signed_codes


class IntegerLinear(nn.Module):
    """``y = sx ((A - zx a) step + (B - zx b) left^T) + bias``, around a product A and B.

    For the formula see ``quant.integer.weight``. Subclasses bring the product.

    Input (..., T, I) and output (..., T, O) are both float32 or bfloat16. Everything between codes
    and output is float32, because the correction takes a difference of large sums.

    Args:
        weight: integers and what multiplies them.
        bias: (O,), or None.
        smooth: (I,) float32, which divides the input, or None.
        act: the activation quantiser.
    """

    def __init__(
            self, weight: IntegerWeight, bias: Tensor | None, smooth: Tensor | None,
            act: QuantSpec):
        super().__init__()
        register_buffers(
            self,
            smooth=smooth,            # (I,) float32, or None for ones
            step=weight.step,         # (O,) float32
            sums=weight.sums,         # (O + r,) float32, a and b
            left=weight.left,         # (O, r) float32
            bias=float32_copy(bias),  # (O,) float32, or None for zeros
        )
        self.act = act

    def product(self, codes: Tensor) -> Tensor:
        """Multiply ``codes`` (M, I) uint8 by all int8 rows: A and B side by side.

        Returns:
            (M, O + r) float32, sums of products.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        values = x.float() if self.smooth is None else x.float() / self.smooth
        signed, scale, zero = signed_codes(values, self.act)
        codes = (signed + zero).to(torch.uint8)
        products = self.product(codes.flatten(0, -2)).unflatten(0, x.shape[:-1])  # (..., T, O + r)
        main, low = split_branch(products, self.left)
        main_sums, low_sums = split_branch(self.sums, self.left)
        # Corrected apart, so that each correction fuses with what follows it.
        main = main - zero * main_sums
        low = low - zero * low_sums
        return rescale(main, low, self.step, self.left, scale, self.bias).to(x.dtype)


class ReferenceLinear(IntegerLinear):
    """Exact on any device: sums of integers in float64, which holds every integer below 2^53."""

    def __init__(
            self, weight: IntegerWeight, bias: Tensor | None, smooth: Tensor | None,
            act: QuantSpec):
        super().__init__(weight, bias, smooth, act)
        self.register_buffer("weight", weight.rows)  # (O + r, I) int8

    def product(self, codes: Tensor) -> Tensor:
        return (codes.double() @ self.weight.double().T).float()
