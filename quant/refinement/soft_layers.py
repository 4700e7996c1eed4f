"""Layers whose rounding and steps are learned."""
from dataclasses import replace

import torch
from torch import Tensor, nn

from quant.activations.quantisers import Activation, TimestepIndex, activation_module
from quant.layers.quantised import QuantizedLayer
from quant.numerics.uniform import OFF_BITS, grouped

STRETCH = (-0.1, 1.1)  # of the sigmoid, so that h reaches 0 and 1 (Louizos et al., 2018)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V), in [0, 1]."""
    low, high = STRETCH
    return (v.sigmoid() * (high - low) + low).clamp(0, 1)


class LearnedStep(nn.Module):
    """A static activation quantiser whose step ``scale`` is a parameter (LSQ); gradients pass straight through the rounding."""

    def __init__(self, act: Activation, clock: TimestepIndex | None):
        super().__init__()
        self.scale = nn.Parameter(act.scale.clone())
        self.register_buffer("zero", act.zero)
        self.top, self.clock = act.spec.top, clock if act.timesteps is not None else None

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale, self.zero
        if self.clock is not None:
            scale, zero = scale[self.clock.index, None], zero[self.clock.index, None]
        codes = values / scale
        codes = codes + (codes.round() - codes).detach()
        return torch.minimum(torch.maximum(codes, -zero), self.top - zero), scale


class StraightThrough(nn.Module):
    """Any other activation quantiser, with the gradient of the identity."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, values: Tensor) -> tuple[Tensor, None]:
        codes, scale = self.module(values.detach())
        return values + ((codes if scale is None else codes * scale) - values).detach(), None


def learnable(act: Activation | None, clock: TimestepIndex | None) -> nn.Module:
    static = act is not None and act.static and act.spec.bits != OFF_BITS
    return LearnedStep(act, clock) if static else StraightThrough(activation_module(act, clock))


class SoftLinear(nn.Module):
    """A quantised linear whose weights are between their two roundings: ``down + (up - down) h(V)``.

    ``h`` is that of the last call, for the regulariser.
    """

    def __init__(self, weight: Tensor, layer: QuantizedLayer, bias: Tensor | None, clock: TimestepIndex | None):
        super().__init__()
        quantized = layer.weight.base
        view, _ = grouped(weight, quantized.spec)
        scale, zero = (each.expand(view.shape).reshape(weight.shape) for each in (quantized.scale, quantized.zero))
        below = (weight / scale).floor()
        fraction = (weight / scale - below).clamp(0.01, 0.99)
        low, high = STRETCH
        self.v, self.h = nn.Parameter(torch.logit((fraction - low) / (high - low))), None
        bottom, top = -zero, quantized.spec.top - zero
        down, up = below.clamp(bottom, top), (below + 1).clamp(bottom, top)
        buffers = {"codes": down + zero, "gap": up - down, "down": down * scale, "step": (up - down) * scale,
                   "bias": bias, "smooth": layer.smooth, "shift": layer.shift}
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.layer, self.act = layer, learnable(layer.act, clock)

    def forward(self, x: Tensor) -> Tensor:
        values = x if self.shift is None else x + self.shift
        values = values if self.smooth is None else values / self.smooth
        codes, scale = self.act(values)
        self.h = rectified_sigmoid(self.v)
        return nn.functional.linear(codes if scale is None else codes * scale, torch.addcmul(self.down, self.step, self.h), self.bias)

    def harden(self) -> QuantizedLayer:
        """The layer with every weight rounded the way it leans, and the steps found."""
        quantized = self.layer.weight.base
        codes = (self.codes + self.gap * (self.v >= 0)).to(torch.uint8)
        act = replace(self.layer.act, scale=self.act.scale.detach()) if isinstance(self.act, LearnedStep) else self.layer.act
        return replace(self.layer, weight=replace(self.layer.weight, base=replace(quantized, codes=codes)), act=act)
