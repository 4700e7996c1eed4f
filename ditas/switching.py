"""Let a loaded model compute in another arithmetic.

``from_pretrained`` may time both and take the faster one. What has to give the same bytes again
says which.
"""
from torch import nn

from ditas.backends import computing_linear, obstacle
from ditas.layouts import from_data
from ditas.packing import PackedLinear, unpacked
from ditas.stowed import StowedLinear
from quant.backend import resolve
from quant.install import unnumbered
from quant.layers.linear import PatchLinear, QuantLinear
from quant.layers.weight_only import WeightOnlyLinear


def is_quantised(module: nn.Module) -> bool:
    """Tell whether a module holds quantised linears."""
    return any(isinstance(part, PackedLinear) for part in module.modules())


def backend_of(model: nn.Module) -> str:
    """Tell in which arithmetic a quantised model computes: ``fake`` or ``integer``."""
    linears = [part for part in model.modules() if isinstance(part, PackedLinear)]
    stowed = next((linear for linear in linears if isinstance(linear, StowedLinear)), None)
    if stowed is not None:
        # The others, if any, were expanded in it.
        return stowed.arithmetic.settle(stowed.weight.dtype, unnumbered(stowed.weight.device))
    return "fake" if all(_simulates(linear.computing) for linear in linears) else "integer"


def switch_backend(model: nn.Module, backend: str) -> None:
    """Let a quantised model of diffusers compute in ``fake`` or ``integer``.

    Where the machine has no integers it is ``fake``, with a warning.

    Raises:
        UserError: the recipe does not allow integers.
    """
    config = model.hf_quantizer.quantization_config
    device = next(model.parameters()).device
    backend = resolve(backend, obstacle(config.request()), device, lambda: backend)
    if backend == backend_of(model):
        return
    for name, layout in from_data(config.stored["layouts"]).items():
        old = model.get_submodule(name)
        if isinstance(old, StowedLinear):
            old.arithmetic.backend = backend
            continue
        # Ranges per timestep are static, and allow one arithmetic only.
        layer, bias = unpacked(
            old.in_file, old.weight.shape, layout.weight, layout.activation(), {})
        window = old.computing.patch if old.is_patches else None
        old.computing = computing_linear(
            layer, bias, backend, old.weight.dtype, old.weight.device, window, None)


def _simulates(linear: nn.Module) -> bool:
    if isinstance(linear, PatchLinear):
        linear = linear.linear
    return isinstance(linear, QuantLinear | WeightOnlyLinear)
