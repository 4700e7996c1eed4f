"""Put quantised layers into a model."""
import torch
from torch import nn

from quant.activations.attention import Operands, QuantAttention
from quant.activations.quantisers import TimestepIndex
from quant.integer.weight import integer_weight, nibbles
from quant.layers.linear import PatchLinear, QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.layers.weight_only import WeightOnlyLinear


def install(model: nn.Module, layers: dict[str, QuantizedLayer], backend: str = "fake", dtype: torch.dtype = torch.float32,
            device: torch.device | str | None = None, packed: bool = False, operands: dict[str, Operands] | None = None) -> nn.Module:
    """Replace the named linears of ``model``, in place; returns it in eval mode, on ``device`` (default: where it is).

    Args:
        layers: what they become.
        backend: ``fake``, ``integer``, or ``reference`` (exact integers, slow).
        dtype: of everything in floating point: float32 or bfloat16.
        packed: on a CPU, keep integer weights at 4 bits and expand them in every call.
        operands: by the name of the attention, how its operands are quantised; None: nowhere.
    """
    device = _unnumbered(model.pos_embed.device if device is None else torch.device(device))
    clock = find_timestep_index(layers)
    modules = {}
    for name, layer in layers.items():
        old = model.get_submodule(name)
        module = _linear(layer, layer.bias(old.bias), backend, dtype, device, packed, clock)
        modules[name] = PatchLinear(module, old.kernel_size) if isinstance(old, nn.Conv2d) else module
    for name in layers:
        model.set_submodule(name, nn.Identity())
    model = model.to(device, dtype)
    for name, each in (operands or {}).items():
        model.set_submodule(name, QuantAttention(model.get_submodule(name), each).to(device))
    for name, module in modules.items():
        model.set_submodule(name, module.to(device))
    if clock is not None:
        clock.to(device).watch(model.t_embedder)
    return model.eval()


def find_timestep_index(layers: dict[str, QuantizedLayer]) -> TimestepIndex | None:
    """For the layers whose ranges depend on the timestep; None if there are none."""
    return next((TimestepIndex(layer.act.timesteps) for layer in layers.values() if layer.act is not None and layer.act.timesteps is not None), None)


def _linear(layer: QuantizedLayer, bias: torch.Tensor | None, backend: str, dtype: torch.dtype, device: torch.device, packed: bool,
            clock: TimestepIndex | None) -> nn.Module:
    if layer.act is None and (backend != "fake" or dtype == torch.float32):
        return _weight_only(layer, bias, backend, dtype, device)
    if backend == "fake":
        return QuantLinear(layer, bias, dtype, clock)
    weight, half, act = integer_weight(layer), nibbles(layer), layer.act.spec
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


def _weight_only(layer: QuantizedLayer, bias: torch.Tensor | None, backend: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if backend == "integer" and device.type == "cpu":
        from quant.integer.cpu import OneDNNWeightOnly
        return OneDNNWeightOnly(integer_weight(layer), bias)
    if backend == "integer":
        from quant.integer.cuda import ExpandedWeightOnly, Int8WeightOnly
        return (Int8WeightOnly if dtype == torch.float32 else ExpandedWeightOnly)(integer_weight(layer), bias)
    return WeightOnlyLinear(layer, bias)


def _unnumbered(device: torch.device) -> torch.device:
    """accelerate says cpu:0, where oneDNN's packed weights cannot be copied to."""
    return torch.device("cpu") if device.type == "cpu" else device
