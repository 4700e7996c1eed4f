"""Which arithmetic a quantised model runs in, and the modules for it."""
import sys
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

from config import UserError
from quant.integer.weight import integer_weight, nibbles
from quant.linear import MODULATION, QuantizedLayer, QuantLinear, WeightOnlyLinear
from quant.quantizer import OFF_BITS, QuantSpec

BACKENDS = ("fake", "integer", "auto")
OFF = QuantSpec(OFF_BITS, "token")


def resolve(backend: str, reason: str | None, device: torch.device) -> str:
    """``fake`` or ``integer``. ``auto`` is integer where the checkpoint allows it and the device has integer instructions.

    Warns on stderr where ``integer`` was asked for and the device has no integer instructions: there it is ``fake``.

    Args:
        reason: why the checkpoint cannot run on integers, if it cannot (see ``quant.integer.weight.why_not``).

    Raises:
        UserError: ``integer`` was asked for and there is such a reason.
    """
    if backend == "fake":
        return "fake"
    if reason:
        if backend == "integer":
            raise UserError(f"--backend integer cannot run this checkpoint: {reason}, or --backend fake")
        return "fake"
    if _fast(device):
        return "integer"
    if backend == "integer":
        print(f"warning: no int8 instructions on {device.type}: --backend fake instead", file=sys.stderr)
    return "fake"


def _fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) and find_spec("triton") is not None
    from quant.integer.cpu import supported
    return supported()


def install(model: nn.Module, layers: dict[str, QuantizedLayer], act: QuantSpec, backend: str = "fake", dtype: torch.dtype = torch.float32,
            device: torch.device | str | None = None, packed: bool = False) -> nn.Module:
    """Replace the named linears of ``model``, in place; returns it in eval mode, on ``device`` (default: where it is).

    Args:
        layers: what they become; adaLN modulations are weight-only.
        act: how the inputs of the others are quantised.
        backend: ``fake``, ``integer``, or ``reference`` (exact integers, slow).
        dtype: of everything in floating point: float32 or bfloat16.
        packed: on a CPU, keep integer weights at 4 bits and expand them in every call.
    """
    device = model.pos_embed.device if device is None else torch.device(device)
    if device.type == "cpu":
        device = torch.device("cpu")  # not cpu:0, as accelerate calls it: oneDNN's packed weights cannot be copied
    modules = {}
    for name, layer in layers.items():
        make = _weight_only if name.endswith(MODULATION) else partial(_linear, act=act, packed=packed)
        modules[name] = make(layer, model.get_submodule(name).bias, backend, dtype, device)
    for name in layers:
        model.set_submodule(name, nn.Identity())
    model = model.to(device, dtype)
    for name, module in modules.items():
        model.set_submodule(name, module.to(device))
    return model.eval()


def _weight_only(layer: QuantizedLayer, bias: torch.Tensor | None, backend: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if backend == "integer" and device.type == "cpu":
        from quant.integer.cpu import OneDNNWeightOnly
        return OneDNNWeightOnly(integer_weight(layer), bias)
    if backend == "integer":
        from quant.integer.cuda import ExpandedWeightOnly, Int8WeightOnly
        return (Int8WeightOnly if dtype == torch.float32 else ExpandedWeightOnly)(integer_weight(layer), bias)
    return WeightOnlyLinear(layer, bias) if dtype == torch.float32 else QuantLinear(layer, bias, OFF, dtype)


def _linear(layer: QuantizedLayer, bias: torch.Tensor | None, backend: str, dtype: torch.dtype, device: torch.device, act: QuantSpec,
            packed: bool) -> nn.Module:
    if backend == "fake":
        return QuantLinear(layer, bias, act, dtype)
    weight, half = integer_weight(layer), nibbles(layer)
    if backend == "reference":
        from quant.integer.linear import ReferenceLinear
        return ReferenceLinear(weight, bias, layer.smooth, act)
    if device.type == "cuda":
        from quant.integer.cuda import TritonLinear
        return TritonLinear(weight, half, bias, layer.smooth, act)
    from quant.integer.cpu import OneDNNLinear, OneDNNNibbleLinear
    if packed and half is not None:
        return OneDNNNibbleLinear(weight, half, bias, layer.smooth, act)
    return OneDNNLinear(weight, bias, layer.smooth, act)
