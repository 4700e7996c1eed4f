"""The one quantised layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.activations.quantisers import TimestepIndex, activation_module
from quant.layers.quantised import QuantizedLayer


class QuantLinear(nn.Module):
    """``y = Qa((x + z) / s) (W_hat + L R)^T + b`` with simulated quantisation (DiTAS, eq. 3; z = 0 there).

    The low-rank branch sees the quantised activation. The floating product is of integer values, as far as the weight's layout has
    them, and scales come after it: sums below 2^24 are exact in float32, so that integer arithmetic gives the same up to the last
    bits. Input (..., T, I) and output (..., T, O) are of type ``dtype``; ranges, codes and what follows the product are float32 work.

    Buffers: ``weight`` (O + r, I) of type ``dtype``, V above R; ``step`` (O,) or None, ``left`` (O, r), ``shift`` and ``smooth`` (I,)
    or None, ``bias`` (O,) or None, all float32.
    """

    def __init__(self, layer: QuantizedLayer, bias: Tensor | None, dtype: torch.dtype = torch.float32, timestep_index: TimestepIndex | None = None):
        super().__init__()
        values, step, left, right = layer.factored()
        for name, value in {"weight": torch.cat([values, right]).to(dtype), "step": step, "left": left, "shift": layer.smoothing.shift, "smooth": layer.smoothing.factors,
                            "bias": float32_copy(bias)}.items():
            self.register_buffer(name, value)
        self.act = activation_module(layer.act, timestep_index)

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        if self.shift is not None:
            values = values + self.shift
        if self.smooth is not None:
            values = values / self.smooth
        values, scale = self.act(values)
        sums, low = split_branch(F.linear(values.to(x.dtype), self.weight), self.left)
        return rescale(sums, low, self.step, self.left, scale, self.bias).to(x.dtype)


class PatchLinear(nn.Module):
    """A patch convolution computed by a linear of patches: (N, C, H, W) to (N, D, H / p, W / p)."""

    def __init__(self, linear: nn.Module, patch: tuple[int, int]):
        super().__init__()
        self.linear, self.patch = linear, patch

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (N, T, C p p)
        return self.linear(patches).transpose(1, 2).unflatten(2, (x.shape[2] // self.patch[0], -1))


def float32_copy(bias: Tensor | None) -> Tensor | None:
    """A float32 copy, which later changes to the linear it came from do not reach."""
    return None if bias is None else bias.detach().float().clone()


def split_branch(sums: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Products (..., O + r or more) with V above R, apart: (..., O) and (..., r), for ``left`` (O, r)."""
    rows, rank = left.shape
    return sums[..., :rows], sums[..., rows:rows + rank]


def rescale(sums: Tensor, low: Tensor, step: Tensor | None, left: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
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
