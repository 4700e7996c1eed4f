"""Integer counterparts of ``QuantLinear``, same forward signature: activation codes, product of integers, one epilogue.

Here the exact reference in plain PyTorch. A backend brings another product; codes and sums, once rounded to float32, are the same in all.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.integer.weight import IntegerWeight
from quant.quantizer import QuantSpec, activation_codes


class IntegerLinear(nn.Module):
    """``y = sx ((A - zx a) step + (B - zx b) left^T) + bias`` (see ``quant.integer.weight``), in plain PyTorch.

    Input (..., T, I), output (..., T, O), both float32 or bfloat16; everything between codes and output is float32, because
    rounding sums to bfloat16 before the correction costs 1 to 2.5 % where channels are outliers.

    Buffers: ``smooth`` (I,) or None, ``step`` (O,), ``sums`` (O,), ``left`` (O, r), ``right_sums`` (r,), ``bias`` (O,) or None, float32.
    """

    def __init__(self, weight: IntegerWeight, bias: Tensor | None, smooth: Tensor | None, act: QuantSpec):
        super().__init__()
        sums, right_sums = weight.sums
        for name, value in {"smooth": smooth, "step": weight.step, "sums": sums, "left": weight.left, "right_sums": right_sums,
                            "bias": None if bias is None else bias.detach().float()}.items():
            self.register_buffer(name, value)
        self.act = act

    def product(self, codes: Tensor) -> Tensor:
        """Sums of products of ``codes`` (M, I) uint8 with all int8 rows: (M, O + r or more) float32, A and B side by side."""
        raise NotImplementedError

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activation codes (..., T, I) uint8, their scale and zero."""
        values = x.float()
        return activation_codes(values if self.smooth is None else values / self.smooth, self.act)

    def forward(self, x: Tensor) -> Tensor:
        codes, scale, zero = self.codes(x)
        sums = self.product(codes.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return self.epilogue(sums, scale, zero).to(x.dtype)

    def epilogue(self, sums: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Sums (..., O + r or more) to outputs (..., O) float32; scale and zero (..., 1)."""
        rows, rank = self.left.shape
        y = (sums[..., :rows] - zero * self.sums) * self.step
        if rank:
            y = y + (sums[..., rows:rows + rank] - zero * self.right_sums) @ self.left.T.to(sums.dtype)
        y = y * scale
        return y if self.bias is None else y + self.bias


class ReferenceLinear(IntegerLinear):
    """Exact on any device: sums of integers in float64, which holds every integer below 2^53."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None, smooth: Tensor | None, act: QuantSpec):
        super().__init__(weight, bias, smooth, act)
        self.register_buffer("weight", torch.cat([weight.codes, weight.right]))

    def product(self, codes: Tensor) -> Tensor:
        return (codes.double() @ self.weight.double().T).float()


class WeightOnlyLinear(nn.Module):
    """``y = x (diag(step) C + left R)^T + bias`` for an input (N, I) in floating point, weights expanded in every call."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None):
        super().__init__()
        for name, value in {"weight": weight.codes, "step": weight.step, "left": weight.left, "right": weight.right,
                            "bias": None if bias is None else bias.detach().float()}.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)).float() * self.step
        y = y + F.linear(x.float(), self.right.float()) @ self.left.T
        return (y if self.bias is None else y + self.bias).to(x.dtype)
