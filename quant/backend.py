"""Which arithmetic a quantised model runs in, and the modules for it."""
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from config import UserError
from quant.activation import Clock
from quant.attention import Operands, QuantAttention
from quant.integer.weight import integer_weight, nibbles
from quant.linear import PatchLinear, QuantizedLayer, QuantLinear, WeightOnlyLinear

BACKENDS = ("fake", "integer", "auto")
MARGIN = 2.0  # so much faster has the simulation to be: noise in close calls (0.9 to 1.5 on small models) must not choose the backend of a run
ROUNDS = 5


def resolve(backend: str, reason: str | None, device: torch.device, measure: Callable[[], str]) -> str:
    """``fake`` or ``integer``. ``auto`` is what ``measure`` finds, where the checkpoint allows integers and the device has instructions for them.

    Warns on stderr where ``integer`` was asked for and the device has no integer instructions: there it is ``fake``.

    Args:
        reason: why the checkpoint cannot run on integers, if it cannot (see ``quant.integer.weight.why_not``).
        measure: ``fake`` or ``integer``, whichever is faster (see ``faster``).

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
        return "integer" if backend == "integer" else measure()
    if backend == "integer":
        print(f"warning: no int8 instructions on {device.type}: --backend fake instead", file=sys.stderr)
    return "fake"


def _fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) and find_spec("triton") is not None
    from quant.integer.cpu import supported
    return supported()


@torch.no_grad()
def faster(layers: list[QuantizedLayer], tokens: int, dtype: torch.dtype, device: torch.device, packed: bool) -> str:
    """``integer``, unless simulating these layers is faster by ``MARGIN``.

    Both are timed in turn, uncompiled, on random input of that many tokens; medians of ``ROUNDS``. Other arguments as in ``install``.
    """
    device = _unnumbered(device)
    inputs = [torch.randn(1, tokens, layer.weight.right.shape[1]).to(device, dtype) for layer in layers]
    rivals = {backend: [_linear(layer, None, backend, dtype, device, packed, None).to(device) for layer in layers] for backend in ("fake", "integer")}
    times: dict[str, list[float]] = {backend: [] for backend in rivals}
    for _ in range(1 + ROUNDS):
        for backend, modules in rivals.items():
            _wait_for(device)
            began = time.perf_counter()
            for module, x in zip(modules, inputs):
                module(x)
            _wait_for(device)
            times[backend].append(time.perf_counter() - began)
    fake, integer = (statistics.median(times[backend][1:]) for backend in ("fake", "integer"))  # the first call prepares, or compiles kernels
    return "fake" if fake * MARGIN < integer else "integer"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _unnumbered(device: torch.device) -> torch.device:
    """accelerate says cpu:0, where oneDNN's packed weights cannot be copied to."""
    return torch.device("cpu") if device.type == "cpu" else device


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
    clock = find_clock(layers)
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


def find_clock(layers: dict[str, QuantizedLayer]) -> Clock | None:
    """For the layers whose ranges depend on the timestep; None if there are none."""
    return next((Clock(layer.act.timesteps) for layer in layers.values() if layer.act is not None and layer.act.timesteps is not None), None)


def _linear(layer: QuantizedLayer, bias: torch.Tensor | None, backend: str, dtype: torch.dtype, device: torch.device, packed: bool,
            clock: Clock | None) -> nn.Module:
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
