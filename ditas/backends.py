"""Which arithmetic a quantised module runs in."""
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from ditas.request import Request
from errors import Part
from quant.activations.quantisers import TimestepIndex
from quant.backend import faster, resolve
from quant.install import make_linear, with_stand_in
from quant.integer.weight import integer_obstacle
from quant.layers.linear import PatchLinear
from quant.layers.quantised import QuantizedLayer
from quant.recipe import act_spec, weight_spec

# What is timed: so many layers, on so many rows of input.
TIMED_LAYERS = 8
TIMED_TOKENS = 256


def allowed_backend(request: Request, device: torch.device) -> str:
    """Choose the arithmetic, as ``quant.backend.resolve`` does; ``auto``: both are to be timed.

    Raises:
        UserError: the backend that was asked for does not go with the recipe.
    """
    return resolve(request.backend, obstacle(request), device, lambda: "auto")


def faster_backend(
    layers: Iterable[QuantizedLayer], kind: torch.dtype, device: torch.device
) -> str:
    """Time the first of the layers in both arithmetics; return the better one's name."""
    of_integers = (layer for layer in layers if layer.act is not None)
    return faster(list(islice(of_integers, TIMED_LAYERS)), TIMED_TOKENS, kind, device, packed=False)


def obstacle(request: Request) -> tuple[Part, ...] | None:
    """Say why a recipe cannot run on integers; None: it can."""
    recipe, bits = request.recipe, request.bits
    return integer_obstacle(
        recipe, weight_spec(recipe, bits.weights), act_spec(recipe, bits.activations))


def computing_linear(
    layer: QuantizedLayer,
    bias: Tensor | None,  # the linear's own
    backend: str,
    kind: torch.dtype,  # of what is not integer
    device: torch.device,
    window: tuple[int, int] | None,  # of a patch convolution
    timestep_index: TimestepIndex | None,
) -> nn.Module:
    """Make the module that computes a quantised linear or patch convolution."""
    linear = make_linear(layer, layer.bias(bias), backend, kind, device, False, timestep_index)
    if window is not None:
        linear = PatchLinear(linear, window)
    return with_stand_in(linear.to(device), kind, device)
