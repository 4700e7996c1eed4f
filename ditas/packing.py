"""Quantised linears keep their codes: a state dict holds these, at their true width.

The module that computes may hold the same weight expanded, or packed for a processor. What a file
needs stays beside it on the CPU, in the words of ``quant.checkpoint.tensors``.
"""
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from quant.activations.attention import Operands, QuantOperands, quantize_operands
from quant.activations.quantisers import Activation, TimestepIndex
from quant.checkpoint.tensors import read_layer, write_layer, write_operands
from quant.layers.linear import PatchLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.spec import OFF_BITS, QuantSpec

Tensors = dict[str, Tensor]

# The tensor of a file that holds the ranges of an attention's operands.
RANGES = "ranges"


def packed(layer: QuantizedLayer, bias: Tensor | None) -> Tensors:
    """Write a quantised linear and its bias as tensors on the CPU.

    Args:
        bias: the linear's own, as it was before ``QuantizedLayer.bias``.
    """
    tensors = write_layer("", layer)
    named = {name.removeprefix("."): value for name, value in tensors.items()}
    if "codes" in named:
        # Loaders of adapters look for the weight of a linear by this name.
        named["weight"] = named.pop("codes")
    if bias is not None:
        named["bias"] = bias.float()
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}


def unpacked(
    tensors: Tensors,
    shape: torch.Size,
    spec: QuantSpec,
    act: Activation | None,
    timesteps: Tensors,
) -> tuple[QuantizedLayer, Tensor | None]:
    """Read what ``packed`` wrote of a weight (O, I).

    Args:
        timesteps: ``TIMESTEPS`` with those of the whole model, or nothing.

    Raises:
        ValueError, KeyError: a tensor is missing or of another shape.
    """
    named = {f".{name}": value for name, value in tensors.items()} | timesteps
    bias = named.pop(".bias", None)
    if spec.bits != OFF_BITS:
        named[".codes"] = named.pop(".weight")
    return read_layer(named, "", shape, spec, act), bias


def packed_bytes(layer: QuantizedLayer) -> int:
    """Count the bytes of a quantised linear in a file, without its bias."""
    return sum(value.nbytes for value in packed(layer, None).values())


class Packed(nn.Module):
    """A module that is saved as other tensors than it computes with.

    Attributes:
        in_file: the tensors that it is saved as, on the CPU.
    """

    in_file: Tensors

    def state_dict(
        self, *, destination: dict[str, Any] | None = None, prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """Give what a file needs in the place of what computes."""
        destination = {} if destination is None else destination
        destination.update({f"{prefix}{name}": value for name, value in self.in_file.items()})
        return destination


class PackedLinear(Packed):
    """A quantised linear in a model.

    Args:
        computing: the module that computes it, with a stand-in (``quant.install``).
        in_file: as of ``Packed``.
        shape: (O, I).
    """

    def __init__(self, computing: nn.Module, in_file: Tensors, shape: torch.Size):
        super().__init__()
        self.computing = computing
        self.in_file = in_file
        self.out_features, self.in_features = shape

    @property
    def weight(self) -> Tensor:
        """Stand for a float weight: of its shape, type and device, but without its values."""
        return self.computing.stand_in.new_empty(1).expand(self.out_features, self.in_features)

    @property
    def is_patches(self) -> bool:
        """Whether it takes images: it was a patch convolution."""
        return isinstance(self.computing, PatchLinear)

    def forward(self, x: Tensor) -> Tensor:
        return self.computing(x)


class PackedOperands(Packed, QuantOperands):
    """The quantised operands of an attention in a model."""

    def __init__(self, operands: Operands, timestep_index: TimestepIndex | None):
        super().__init__(operands, timestep_index)
        self.in_file = {RANGES: write_operands(operands).cpu()}


def packed_operands(
    operands: dict[str, Operands], timestep_index: TimestepIndex | None, device: torch.device
) -> dict[str, PackedOperands]:
    """Make what quantises the operands of attentions, by their names."""
    return {name: PackedOperands(quantisers, timestep_index).to(device)
            for name, quantisers in operands.items()}


def put(
    model: nn.Module, linears: dict[str, PackedLinear], operands: dict[str, PackedOperands]
) -> None:
    """Put quantised linears where others are, and operands into attentions; nothing is computed."""
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    for name, module in operands.items():
        quantize_operands(model.get_submodule(name), module)


def welcome_adapters() -> None:
    """Let peft, if it is installed, put adapters beside the linears of quantised models."""
    if find_spec("peft") is not None:
        # Not at the top of the file: it is needed for this alone, and takes most of a second.
        from ditas.adapters import register
        register()
