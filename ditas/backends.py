"""Which arithmetic a quantised module runs in."""
from collections.abc import Sequence
from functools import partial

import torch

from ditas.request import Request
from quant.backend import faster, resolve
from quant.integer.weight import integer_obstacle
from quant.layers.quantised import QuantizedLayer
from quant.recipe import act_spec, weight_spec

# What is timed: so many layers, on so many rows of input.
TIMED_LAYERS = 8
TIMED_TOKENS = 256


def choose_backend(
    request: Request, layers: Sequence[QuantizedLayer], kind: torch.dtype, device: torch.device
) -> str:
    """Choose the arithmetic, as ``quant.backend.resolve`` does.

    Args:
        layers: that will run in it.
        kind: the type of what is not integer.

    Raises:
        UserError: the backend that was asked for does not go with the recipe.
    """
    recipe, bits = request.recipe, request.bits
    obstacle = integer_obstacle(
        recipe, weight_spec(recipe, bits.weights), act_spec(recipe, bits.activations))
    timed = [layer for layer in layers if layer.act is not None][:TIMED_LAYERS]
    measure = partial(faster, timed, TIMED_TOKENS, kind, device, packed=False)
    return resolve(request.backend, obstacle, device, measure)
