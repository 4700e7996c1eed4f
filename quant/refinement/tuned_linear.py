"""A linear whose codes and low-rank branch are learned, inside scales that stay."""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.activations.quantisers import activation_module
from quant.layers.buffers import register_buffers
from quant.layers.quantised import QuantizedLayer
from quant.numerics.uniform import Quantized, grouped
from quant.refinement.soft_layers import StraightThrough
from quant.weights.low_rank import LowRankWeight
from quant.weights.stowed import stow_weight
from quant.weights.two_level import LIMIT


class TunedLinear(nn.Module):
    """A quantised linear ``y = Qa(x / s) (V diag(step) + L R)^T + b`` that learns V and L.

    Codes are real numbers which every call rounds; gradients pass straight through the rounding
    (Bengio et al., 2013). Scales, zero points, steps, R and the bias stay.

    A code starts in the middle of what rounds to it. So it takes many steps in the same direction
    until it turns, which the noise of the images that are drawn does not make.

    Args:
        layer: of two-level scales (``quant.weights.two_level``).
        bias: (O,), or None.
    """

    def __init__(self, layer: QuantizedLayer, bias: Tensor | None):
        super().__init__()
        base, left, right = layer.weight.base, layer.weight.left, layer.weight.right
        codes, _ = grouped(base.codes, base.spec)
        self.signed = nn.Parameter(codes - base.zero)  # (O, G, g)
        self.left = nn.Parameter(left.clone())
        bound = (LIMIT / base.scale).floor()
        register_buffers(
            self,
            low=torch.maximum(-base.zero, -bound),
            high=torch.minimum(base.spec.top - base.zero, bound),
            scale=base.scale,
            step=base.step,
            right=right,
            factors=layer.smoothing.factors,
            bias=None if bias is None else bias.detach(),
        )
        self.act = StraightThrough(activation_module(layer.act))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        values = x if self.factors is None else x / self.factors
        values, _ = self.act(values)
        return F.linear(values, self.weight(), self.bias)

    def weight(self) -> Tensor:
        """Compute the weight (O, I), with every code rounded."""
        values = (self.rounded() * self.scale).flatten(1) * self.step
        return torch.addmm(values, self.left, self.right)

    def rounded(self) -> Tensor:
        """Round to integers ``q - zero`` that have a code, (O, G, g)."""
        inside = torch.minimum(torch.maximum(self.signed, self.low), self.high)
        return inside + (inside.round() - inside).detach()

    @torch.no_grad()
    def harden(self) -> QuantizedLayer:
        """Return the layer with what was learned, in the types that a file has."""
        base = self.layer.weight.base
        codes = (self.rounded() + base.zero).to(torch.uint8).flatten(1)
        base = Quantized(codes, base.scale, base.zero, base.spec, base.step)
        weight = LowRankWeight(base, self.left.bfloat16().float(), self.right)
        return replace(self.layer, weight=stow_weight(weight))
