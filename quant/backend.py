"""Which arithmetic a quantised model runs in, and the modules for it."""
import sys

import torch
from torch import nn

from config import UserError
from quant.integer.weight import integer_weight, nibbles, why_not
from quant.linear import MODULATION, QuantizedLayer, QuantLinear
from quant.quantizer import OFF_BITS, QuantSpec

BACKENDS = ("fake", "integer", "auto")
OFF = QuantSpec(OFF_BITS, "token")


def resolve(backend: str, layers: dict[str, QuantizedLayer], act: QuantSpec, device: torch.device) -> str:
    """``fake`` or ``integer``. ``auto`` is integer where the layers allow it and the device is faster at it.

    Warns on stderr where ``integer`` was asked for and the device has no integer instructions: there it is ``fake``.

    Raises:
        UserError: ``integer`` was asked for and the layers do not allow it.
    """
    if backend == "fake":
        return "fake"
    if reason := why_not(layers, act):
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
        return torch.cuda.get_device_capability(device) >= (8, 0)
    from quant.integer.cpu import supported
    return supported()


def install(model: nn.Module, layers: dict[str, QuantizedLayer], act: QuantSpec, backend: str = "fake", dtype: torch.dtype = torch.float32,
            device: torch.device | str = "cpu", packed: bool = False) -> nn.Module:
    """Replace the named linears of ``model``, in place, and move it; returns it in eval mode.

    Args:
        layers: what they become; adaLN modulations are weight-only.
        act: how the inputs of the others are quantised.
        backend: ``fake``, ``integer``, or ``reference`` (exact integers, slow).
        dtype: of everything in floating point: float32 or bfloat16.
        packed: on a CPU, keep integer weights at 4 bits and expand them in every call.
    """
    device = torch.device(device)
    modules = {name: _module(layer, model.get_submodule(name).bias, OFF if name.endswith(MODULATION) else act, backend, dtype, device, packed)
               for name, layer in layers.items()}
    for name in layers:
        model.set_submodule(name, nn.Identity())
    model = model.to(device, dtype)
    for name, module in modules.items():
        model.set_submodule(name, module.to(device))
    return model.eval()


def _module(layer: QuantizedLayer, bias: torch.Tensor | None, act: QuantSpec, backend: str, dtype: torch.dtype, device: torch.device,
            packed: bool) -> nn.Module:
    if backend == "fake":
        return QuantLinear(layer, bias, act, dtype)
    weight = integer_weight(layer)
    if backend == "reference":
        from quant.integer.linear import ReferenceLinear, WeightOnlyLinear
        return WeightOnlyLinear(weight, bias) if act.bits == OFF_BITS else ReferenceLinear(weight, bias, layer.smooth, act)
    half = nibbles(layer)
    if device.type == "cuda":
        from quant.integer.cuda import TritonLinear
        from quant.integer.linear import WeightOnlyLinear
        return WeightOnlyLinear(weight, bias) if act.bits == OFF_BITS else TritonLinear(weight, half, bias, layer.smooth, act)
    from quant.integer.cpu import OneDNNLinear, OneDNNNibbleLinear, OneDNNWeightOnly
    if act.bits == OFF_BITS:
        return OneDNNWeightOnly(weight, bias, layer.smooth, act)
    if packed and half is not None:
        return OneDNNNibbleLinear(weight, half, bias, layer.smooth, act)
    return OneDNNLinear(weight, bias, layer.smooth, act)
