"""How the input of a linear becomes codes: ranges measured in every call, or found once on calibration data."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.numerics.uniform import OFF_BITS, QuantSpec, signed_codes


@dataclass(frozen=True)
class Activation:
    """A quantiser of activations.

    Attributes:
        spec: bits and what shares a range. A static range holds for the whole tensor.
        scale, zero: float32 static range, () for all timesteps or (S,) for each of ``timesteps``; None: dynamic.
        timesteps: (S,) int64, what the model is called with at each step, where the range depends on it.
    """

    spec: QuantSpec
    scale: Tensor | None = None
    zero: Tensor | None = None
    timesteps: Tensor | None = None

    @property
    def static(self) -> bool:
        return self.scale is not None


class TimestepIndex(nn.Module):
    """Tells which timestep the model was called with; a part of its timestep embedder, so that a copy of the model has its own.

    Buffers: ``timesteps`` (S,) int64. Attribute ``index`` (N,): the nearest of them for every image of the call.
    """

    def __init__(self, timesteps: Tensor):
        super().__init__()
        self.register_buffer("timesteps", timesteps)
        self.index = None

    def watch(self, embedder: nn.Module) -> None:
        """Look at the timesteps (N,) that the embedder gets."""
        embedder.clock = self
        embedder.register_forward_pre_hook(lambda module, inputs: module.clock.see(inputs[0]))

    def see(self, t: Tensor) -> None:
        self.index = (t[:, None] - self.timesteps).abs().argmin(1)


class Float(nn.Module):
    """Leaves activations alone. Like the others: values (..., T, I) float32 to what enters the product, and what multiplies it after, or None."""

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        return values, None


class Dynamic(nn.Module):
    """Codes in ranges of their own: integer-valued, with scales (..., T, 1)."""

    def __init__(self, spec: QuantSpec):
        super().__init__()
        self.spec = spec

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        codes, scale, _ = signed_codes(values, self.spec)
        return codes, scale


class DynamicGroups(Dynamic):
    """The same in groups of input channels, whose scales cannot leave the product: dequantised values."""

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        codes, scale, _ = signed_codes(values, self.spec)
        return codes.mul_(scale).flatten(-2), None


class Static(nn.Module):
    """Codes in one range for all; buffers ``scale``, ``zero`` ()."""

    def __init__(self, act: Activation):
        super().__init__()
        self.register_buffer("scale", act.scale)
        self.register_buffer("zero", act.zero)
        self.top = act.spec.top

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        return (values / self.scale).round().clamp(-self.zero, self.top - self.zero), self.scale


class PerTimestep(nn.Module):
    """Codes in a range per timestep, for inputs (N, I) that depend on nothing else much; buffers ``scale``, ``zero`` (S, 1)."""

    def __init__(self, act: Activation, clock: TimestepIndex):
        super().__init__()
        self.register_buffer("scale", act.scale[:, None])
        self.register_buffer("zero", act.zero[:, None])
        self.top, self.clock = act.spec.top, clock

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero = self.scale[self.clock.index], self.zero[self.clock.index]  # (N, 1)
        return torch.minimum(torch.maximum((values / scale).round(), -zero), self.top - zero), scale


def activation_module(act: Activation | None, clock: TimestepIndex | None = None) -> nn.Module:
    """The module for an activation quantiser; None leaves activations alone."""
    if act is None or act.spec.bits == OFF_BITS:
        return Float()
    if not act.static:
        return (DynamicGroups if act.spec.granularity == "group" else Dynamic)(act.spec)
    return Static(act) if act.timesteps is None else PerTimestep(act, clock)
