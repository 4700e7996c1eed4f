"""Put quantised layers into a model."""
import torch
from torch import Tensor, nn

from architectures.registry import architecture_of
from quant.activations.attention import Operands, QuantOperands, quantize_operands
from quant.activations.quantisers import TimestepIndex, watch_timesteps
from quant.integer.weight import integer_weight, nibbles
from quant.layers.linear import PatchLinear, QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.layers.weight_only import WeightOnlyLinear


def install(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    backend: str = "fake",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    packed: bool = False,
    operands: dict[str, Operands] | None = None,
) -> nn.Module:
    """Replace the named linears of a model, in place.

    Args:
        layers: what they become.
        backend: ``fake``, ``integer``, or ``reference`` (exact integers, slow).
        dtype: of everything in floating point: float32 or bfloat16.
        device: where the model goes; None: it stays where it is.
        packed: on a CPU, keep integer weights at 4 bits and expand them in every call.
        operands: by the name of the attention, how its operands are quantised; None: nowhere.

    Returns:
        The model, in eval mode.
    """
    device = unnumbered(device_of(model) if device is None else torch.device(device))
    operands = operands or {}
    timestep_index = find_timestep_index(layers, operands)
    modules = make_modules(model, layers, backend, dtype, device, packed, timestep_index)
    # The float weights go before anything is moved or converted.
    for name in layers:
        model.set_submodule(name, nn.Identity())
    model.to(device, dtype)
    for name, module in modules.items():
        model.set_submodule(name, module)
    for name, quantisers in operands.items():
        module = QuantOperands(quantisers, timestep_index).to(device)
        quantize_operands(model.get_submodule(name), module)
    if timestep_index is not None:
        watch_timesteps(model, timestep_index.to(device), architecture_of(model).clock)
    return model.eval()


def make_modules(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    timestep_index: TimestepIndex | None,
) -> dict[str, nn.Module]:
    """Make what the named linears of a model become; the model stays as it is."""
    modules = {}
    for name, layer in layers.items():
        old = model.get_submodule(name)
        bias = layer.bias(old.bias)
        module = make_linear(layer, bias, backend, dtype, device, packed, timestep_index)
        if isinstance(old, nn.Conv2d):
            module = PatchLinear(module, old.kernel_size)
        modules[name] = with_stand_in(module.to(device), dtype, device)
    return modules


def with_stand_in(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Give a module an empty parameter: a model's code may ask it for its type and device."""
    stand_in = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
    module.register_parameter("stand_in", stand_in)
    return module


def put_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module where a quantised linear is, or that of a patch convolution."""
    old = model.get_submodule(name)
    module = with_stand_in(module, torch.float32, device_of(model))
    if isinstance(old, PatchLinear):
        old.linear = module
    else:
        model.set_submodule(name, module)


def device_of(model: nn.Module) -> torch.device:
    """Find the device of a float model."""
    return next(model.parameters()).device


def find_timestep_index(
    layers: dict[str, QuantizedLayer], operands: dict[str, Operands]
) -> TimestepIndex | None:
    """Make the index that all ranges per timestep share; None if there are none."""
    timesteps = [layer.act.timesteps for layer in layers.values() if layer.act is not None]
    timesteps += [quantisers.timesteps for quantisers in operands.values()]
    known = next((values for values in timesteps if values is not None), None)
    return None if known is None else TimestepIndex(known)


def make_linear(
    layer: QuantizedLayer,
    bias: Tensor | None,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool,
    timestep_index: TimestepIndex | None,
) -> nn.Module:
    """Make the module that computes a quantised linear."""
    if layer.act is None and (backend != "fake" or dtype == torch.float32):
        return _weight_only(layer, bias, backend, dtype, device)
    if backend == "fake":
        return QuantLinear(layer, bias, dtype, timestep_index)
    weight, half = integer_weight(layer), nibbles(layer)
    factors, spec = layer.smoothing.factors, layer.act.spec
    if backend == "reference":
        from quant.integer.linear import ReferenceLinear
        return ReferenceLinear(weight, bias, factors, spec)
    if device.type == "cuda":
        from quant.integer.cuda import TritonLinear
        return TritonLinear(weight, half, bias, factors, spec)
    from quant.integer.cpu import OneDNNLinear, OneDNNNibbleLinear
    if packed and half is not None:
        return OneDNNNibbleLinear(weight, half, bias, factors, spec)
    return OneDNNLinear(weight, bias, factors, spec)


def _weight_only(
    layer: QuantizedLayer,
    bias: Tensor | None,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Make the module of a linear whose input stays in floating point."""
    if backend == "integer" and device.type == "cpu":
        from quant.integer.cpu import OneDNNWeightOnly
        return OneDNNWeightOnly(integer_weight(layer), bias)
    if backend == "integer":
        from quant.integer.cuda import ExpandedWeightOnly, Int8WeightOnly
        kind = Int8WeightOnly if dtype == torch.float32 else ExpandedWeightOnly
        return kind(integer_weight(layer), bias)
    return WeightOnlyLinear(layer, bias)


def unnumbered(device: torch.device) -> torch.device:
    """Drop the number of a CPU device."""
    # accelerate says cpu:0, where oneDNN's packed weights cannot be copied to.
    return torch.device("cpu") if device.type == "cpu" else device
