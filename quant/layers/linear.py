"""Linears with a quantised weight and a quantised input, simulated in floating point."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.activations.quantisers import TimestepIndex, activation_module
from quant.layers.buffers import register_buffers
from quant.layers.quantised import QuantizedLayer


class QuantLinear(nn.Module):
    """Simulates quantisation: ``y = Qa((x + z) / s) (W_hat + L R)^T + b`` (DiTAS, eq. 3; z = 0).

    The low-rank branch sees the quantised activation. The floating product is of integer values, as
    far as the weight's layout has them, and scales come after it. Sums below 2^24 are exact in
    float32, so that integer arithmetic gives the same up to the last bits.

    Input (..., T, I) and output (..., T, O) are of one floating type; ranges, codes and what
    follows the product are float32 work.

    Args:
        layer: what quantisation found.
        bias: (O,), or None.
        dtype: of the product, float32 or bfloat16.
        timestep_index: the sampling step, for activation ranges that depend on it.
    """

    def __init__(
            self, layer: QuantizedLayer, bias: Tensor | None, dtype: torch.dtype = torch.float32,
            timestep_index: TimestepIndex | None = None):
        super().__init__()
        values, step, left, right = layer.factored()
        register_buffers(
            self,
            weight=torch.cat([values, right]).to(dtype),  # (O + r, I) of type dtype, V above R
            step=step,                                    # (O,) float32, or None for ones
            left=left,                                    # (O, r) float32
            shift=layer.smoothing.shift,                  # (I,) float32, or None for zeros
            smooth=layer.smoothing.factors,               # (I,) float32, or None for ones
            bias=float32_copy(bias),                      # (O,) float32, or None for zeros
        )
        self.act = activation_module(layer.act, timestep_index)

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()                                     # (..., T, I)
        if self.shift is not None:
            values = values + self.shift
        if self.smooth is not None:
            values = values / self.smooth
        values, scale = self.act(values)
        products = F.linear(values.to(self.weight.dtype), self.weight)  # (..., T, O + r)
        sums, low = split_branch(products, self.left)
        return rescale(sums, low, self.step, self.left, scale, self.bias).to(x.dtype)


class PatchLinear(nn.Module):
    """A patch convolution computed by a linear of patches.

    Input (N, C, H, W), output (N, D, H / p, W / p).

    Args:
        linear: of patches, (..., T, C p p) to (..., T, D).
        patch: height and width of a patch.
    """

    def __init__(self, linear: nn.Module, patch: tuple[int, int]):
        super().__init__()
        self.linear = linear
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (N, T, C p p)
        rows = x.shape[2] // self.patch[0]
        return self.linear(patches).transpose(1, 2).unflatten(2, (rows, -1))  # (N, D, H/p, W/p)


def float32_copy(bias: Tensor | None) -> Tensor | None:
    """Copy a bias to float32, so that later changes to the linear it came from do not reach it."""
    return None if bias is None else bias.detach().float().clone()


def split_branch(sums: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Split products with V and with R, which lie side by side.

    Args:
        sums: (..., O + r or more).
        left: (O, r).

    Returns:
        Views of shape (..., O) and (..., r).
    """
    rows, rank = left.shape
    return sums[..., :rows], sums[..., rows:rows + rank]


def rescale(
        sums: Tensor, low: Tensor, step: Tensor | None, left: Tensor,
        scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute what follows the products with V and R: ``(sums step + low L^T) scale + bias``.

    Args:
        sums: (..., T, O), products with V.
        low: (..., T, r), products with R.
        step: (O,); None for ones.
        left: L (O, r).
        scale: broadcasts with (..., T, 1); None for ones.
        bias: (O,); None for zeros.

    Returns:
        (..., T, O).
    """
    y = sums.float() if step is None else sums * step
    if left.shape[1]:
        y = y + F.linear(low.to(left.dtype), left)
    if scale is not None:
        y = y * scale
    return y if bias is None else y + bias
