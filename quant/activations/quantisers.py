"""How an activation becomes codes: in ranges measured in every call, or found once.

Every module here maps values (..., T, I) float32 to a pair: what enters the product, and the scale
to multiply the product by (None: 1).
"""
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from architectures.sites import call_of, timesteps_of
from quant.numerics.spec import OFF_BITS, QuantSpec
from quant.numerics.uniform import signed_codes, ungrouped


@dataclass(frozen=True)
class Activation:
    """How an activation is quantised.

    Attributes:
        spec: bits and what shares a range. A static range holds for the whole tensor.
        scale, zero: float32 static range, () for all steps or (S,) for each of ``timesteps``;
            None: measured in every call.
        timesteps: (S,) int64, what the model is called with at each step, where the range depends
            on it.
    """

    spec: QuantSpec
    scale: Tensor | None = None
    zero: Tensor | None = None
    timesteps: Tensor | None = None

    @property
    def is_static(self) -> bool:
        return self.scale is not None


class TimestepIndex(nn.Module):
    """Tells which step a model was called for, to the quantisers whose ranges depend on it.

    It is a part of the model that it watches, so that a copy of the model has its own.

    Attributes:
        timesteps: (S,) int64 buffer.
        index: (N,), the nearest of them for every image of the latest call.
    """

    def __init__(self, timesteps: Tensor):
        super().__init__()
        self.register_buffer("timesteps", timesteps)
        self.index: Tensor | None = None

    def update(self, t: Tensor) -> None:
        """Keep the nearest step for every timestep (N,)."""
        self.index = self.nearest(t)

    def nearest(self, t: Tensor) -> Tensor:
        """Find the nearest step for every timestep (N,)."""
        return (t[:, None] - self.timesteps.to(t.device)).abs().argmin(1)

    def select(self, per_step: Tensor, values: Tensor) -> Tensor:
        """Pick the entry (S,) of each image's step, so that it broadcasts with values (N, ...)."""
        return per_step[self.index].reshape(-1, *[1] * (values.dim() - 1))


def watch_timesteps(model: nn.Module, timestep_index: TimestepIndex, clock: str) -> None:
    """Keep the index up to date whenever the model is called.

    Args:
        clock: as of ``Architecture``.
    """
    model.timestep_index = timestep_index
    model.register_forward_pre_hook(partial(_update_index, clock=clock), with_kwargs=True)


def _update_index(model: nn.Module, args: tuple, kwargs: dict, clock: str) -> None:
    timesteps = timesteps_of(call_of(model, args, kwargs), clock)
    model.timestep_index.update(timesteps)


class Float(nn.Module):
    """Leaves activations alone."""

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        return values, None


class Dynamic(nn.Module):
    """Quantises in ranges of the values' own: integer-valued codes, and scales (..., T, 1)."""

    def __init__(self, spec: QuantSpec):
        super().__init__()
        self.spec = spec

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        codes, scale, _ = signed_codes(values, self.spec)
        return codes, scale


class DynamicGroups(Dynamic):
    """Quantises groups of input channels, whose scales cannot leave the product: values again."""

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        codes, scale, _ = signed_codes(values, self.spec)
        return ungrouped(codes.mul_(scale), values.shape), None


class Static(nn.Module):
    """Quantises in one range for all; buffers ``scale`` and ``zero`` ()."""

    def __init__(self, act: Activation):
        super().__init__()
        self.register_buffer("scale", act.scale)
        self.register_buffer("zero", act.zero)
        self.top_code = act.spec.top

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        codes = (values / self.scale).round().clamp(-self.zero, self.top_code - self.zero)
        return codes, self.scale


class PerTimestep(nn.Module):
    """Quantises values (N, ...), each image in the range of its step.

    Buffers ``scale`` and ``zero`` (S,).
    """

    def __init__(self, act: Activation, timestep_index: TimestepIndex):
        super().__init__()
        self.register_buffer("scale", act.scale)
        self.register_buffer("zero", act.zero)
        self.top_code = act.spec.top
        self.timestep_index = timestep_index

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = self.timestep_index.select(self.scale, values)
        zero = self.timestep_index.select(self.zero, values)
        codes = (values / scale).round()
        return torch.minimum(torch.maximum(codes, -zero), self.top_code - zero), scale


def activation_module(
    act: Activation | None, timestep_index: TimestepIndex | None = None
) -> nn.Module:
    """Make the module of an activation quantiser; None leaves activations alone."""
    if act is None or act.spec.bits == OFF_BITS:
        return Float()
    if not act.is_static:
        grouped = act.spec.granularity == "group"
        return DynamicGroups(act.spec) if grouped else Dynamic(act.spec)
    if act.timesteps is None:
        return Static(act)
    return PerTimestep(act, timestep_index)
