"""Layers whose rounding and activation steps are learned (Nagel et al., 2020; LSQ)."""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.activations.quantisers import Activation, TimestepIndex, activation_module
from quant.layers.quantised import QuantizedLayer
from quant.numerics.spec import OFF_BITS
from quant.numerics.stowed import stow
from quant.numerics.uniform import Quantized, grouped

# The sigmoid is stretched, so that h reaches 0 and 1 (Louizos et al., 2018).
STRETCH = (-0.1, 1.1)

# Least distance of a start from 0 and 1, where the logit would be infinite.
LEAST_FRACTION = 0.01


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Compute h(V), in [0, 1]."""
    low, high = STRETCH
    return (v.sigmoid() * (high - low) + low).clamp(0, 1)


class LearnedStep(nn.Module):
    """A static activation quantiser whose step ``scale`` is a parameter (LSQ).

    Gradients pass straight through the rounding.
    """

    def __init__(self, act: Activation, timestep_index: TimestepIndex | None):
        super().__init__()
        self.scale = nn.Parameter(act.scale.clone())
        self.register_buffer("zero", act.zero)
        self.top_code = act.spec.top
        self.timestep_index = None if act.timesteps is None else timestep_index

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale, self.zero
        if self.timestep_index is not None:
            scale = self.timestep_index.select(scale, values)
            zero = self.timestep_index.select(zero, values)
        codes = values / scale
        codes = codes + (codes.round() - codes).detach()
        return torch.minimum(torch.maximum(codes, -zero), self.top_code - zero), scale


class StraightThrough(nn.Module):
    """Any other activation quantiser, with the gradient of the identity."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, values: Tensor) -> tuple[Tensor, None]:
        codes, scale = self.module(values.detach())
        seen = codes if scale is None else codes * scale
        return values + (seen - values).detach(), None


def learnable(act: Activation | None, timestep_index: TimestepIndex | None) -> nn.Module:
    """Make the module of an activation quantiser whose static step is learned."""
    if act is not None and act.is_static and act.spec.bits != OFF_BITS:
        return LearnedStep(act, timestep_index)
    return StraightThrough(activation_module(act, timestep_index))


class SoftLinear(nn.Module):
    """A quantised linear whose weights are between their two roundings.

    The weight is ``down + (up - down) h(V)``. Attribute ``h`` is that of the last call, for the
    regulariser.

    Args:
        weight: (O, I) float, as it enters quantisation (multiplied by smoothing factors).
        layer: that weight rounded to the nearest.
        bias: what is added to the product, (O,) or None.
    """

    def __init__(
        self,
        weight: Tensor,
        layer: QuantizedLayer,
        bias: Tensor | None,
        timestep_index: TimestepIndex | None,
    ):
        super().__init__()
        base = layer.weight.base
        view, _ = grouped(weight, base.spec)
        scale = base.scale.expand(view.shape).reshape(weight.shape)  # (O, I)
        zero = base.zero.expand(view.shape).reshape(weight.shape)    # (O, I)

        # Start where h gives the weight itself.
        below = (weight / scale).floor()
        fraction = (weight / scale - below).clamp(LEAST_FRACTION, 1 - LEAST_FRACTION)
        low, high = STRETCH
        self.v = nn.Parameter(torch.logit((fraction - low) / (high - low)))
        self.h: Tensor | None = None

        bottom, top = -zero, base.spec.top - zero
        down, up = below.clamp(bottom, top), (below + 1).clamp(bottom, top)
        self.register_buffer("codes", down + zero)
        self.register_buffer("gap", up - down)
        self.register_buffer("down", down * scale)
        self.register_buffer("step", (up - down) * scale)
        self.register_buffer("bias", bias)
        self.register_buffer("factors", layer.smoothing.factors)
        self.register_buffer("shift", layer.smoothing.shift)
        self.layer = layer
        self.act = learnable(layer.act, timestep_index)

    def forward(self, x: Tensor) -> Tensor:
        values = x if self.shift is None else x + self.shift
        values = values if self.factors is None else values / self.factors
        codes, scale = self.act(values)
        inputs = codes if scale is None else codes * scale
        self.h = rectified_sigmoid(self.v)
        return F.linear(inputs, self.weight, self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight, (O, I), as ``h`` rounds it."""
        return self.down if self.h is None else torch.addcmul(self.down, self.step, self.h)

    def harden(self) -> QuantizedLayer:
        """Return the layer with every weight rounded the way it leans, and the learned step."""
        codes = (self.codes + self.gap * (self.v >= 0)).to(torch.uint8)
        old = self.layer.weight.base
        base = Quantized(codes, old.scale, old.zero, old.spec, old.step)
        act = self.layer.act
        if isinstance(self.act, LearnedStep):
            act = replace(act, scale=self.act.scale.detach())
        return replace(self.layer, weight=replace(self.layer.weight, base=stow(base)), act=act)
