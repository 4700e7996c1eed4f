"""Fold smoothing factors into the layers before, so that sampling divides less (DiTAS, 4.4).

Dividing the input of a linear behind a modulated LayerNorm is dividing shift and scale; dividing
what reads the values that attention averages is dividing V. Of a quantised weight only the scales
of its output channels change, never a code. Where a factor goes is said by the site's ``folds``.
"""
from dataclasses import replace

import torch
from torch import Tensor, nn

from architectures.registry import architecture_of
from architectures.sites import Fold, Modulation, Rows, SharedModulation, Site
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import NO_SMOOTHING, Smoothing

Layers = dict[str, QuantizedLayer]


@torch.no_grad()
def fold(model: nn.Module, layers: Layers) -> Layers:
    """Divide each site's factors out where its activation is made.

    Args:
        model: with float linears where ``layers`` are not installed yet. Its biases, float
            modulation weights and tables change in place.
        layers: by name; stay as they are.

    Returns:
        The layers to install.
    """
    layers = dict(layers)
    for site in architecture_of(model).sites(model, "blocks"):
        smoothing = layers[site.linears[0]].smoothing
        if smoothing.is_none or not site.folds:
            continue
        if smoothing.shift is not None:
            _take_shift_out_of_biases(model, site, layers)
        for place in site.folds:
            _divide(model, layers, place, smoothing)
        for name in site.linears:
            layers[name] = replace(layers[name], smoothing=NO_SMOOTHING)
    return layers


def _take_shift_out_of_biases(model: nn.Module, site: Site, layers: Layers) -> None:
    for name in site.linears:
        linear = model.get_submodule(name)
        bias = layers[name].bias(linear.bias)
        linear.bias = nn.Parameter(bias, requires_grad=False)


def _divide(model: nn.Module, layers: Layers, place: Fold, smoothing: Smoothing) -> None:
    """Let a place give ``(x + shift) / factors`` instead of ``x``."""
    if isinstance(place, Modulation):
        divide_modulation(model, layers, place, smoothing)
    elif isinstance(place, SharedModulation):
        divide_shared_modulation(model, place, smoothing)
    else:
        divide_rows(model, layers, place, smoothing)


def divide_rows(model: nn.Module, layers: Layers, place: Rows, smoothing: Smoothing) -> None:
    """Divide output channels of a linear by the factors (D,), bias included."""
    _divide_weight_rows(model, layers, place.linear, place.rows, smoothing.factors)
    bias = model.get_submodule(place.linear).bias
    if bias is not None:
        bias[place.rows] /= smoothing.factors


def divide_modulation(
    model: nn.Module, layers: Layers, place: Modulation, smoothing: Smoothing
) -> None:
    """Add the shift (D,) to ``x (1 + scale) + shift`` and divide by the factors (D,)."""
    factors = smoothing.factors
    shift, scale = _chunk(place.shift, len(factors)), _chunk(place.scale, len(factors))
    for rows in (shift, scale):
        _divide_weight_rows(model, layers, place.linear, rows, factors)
    bias = model.get_submodule(place.linear).bias
    if smoothing.shift is not None:
        bias[shift] += smoothing.shift
    bias[shift] /= factors
    bias[scale] = (1 + bias[scale]) / factors - 1


def divide_shared_modulation(
    model: nn.Module, place: SharedModulation, smoothing: Smoothing
) -> None:
    """Do the same through a block's table, and divide what enters the block."""
    factors, table = smoothing.factors, model.get_parameter(place.table)
    if smoothing.shift is not None:
        table[place.shift] += smoothing.shift
    table[place.shift] /= factors
    table[place.scale] = (1 + table[place.scale]) / factors - 1
    divisor = _divisor_of(model.get_submodule(place.block), place.argument, table)
    for chunk in (place.shift, place.scale):
        divisor[_chunk(chunk, len(factors))] *= factors


def _chunk(number: int, width: int) -> slice:
    return slice(number * width, (number + 1) * width)


def _divide_weight_rows(
    model: nn.Module, layers: Layers, name: str, rows: slice, factors: Tensor
) -> None:
    """Divide output channels of a linear, quantised or not, its bias aside."""
    if name in layers:
        layers[name] = layers[name].divide_rows(rows, factors)
    else:
        model.get_submodule(name).weight[rows] /= factors[:, None]


class DividedArgument(nn.Module):
    """What a block divides one of its arguments (N, chunks D) by; buffer ``divisor``."""

    def __init__(self, argument: str, divisor: Tensor):
        super().__init__()
        self.argument = argument
        self.register_buffer("divisor", divisor)


def _divisor_of(block: nn.Module, argument: str, table: Tensor) -> Tensor:
    """Return what a block divides an argument by, ones at first, to be changed in place."""
    if not hasattr(block, "divided_argument"):
        divisor = torch.ones(table.numel(), device=table.device)
        block.divided_argument = DividedArgument(argument, divisor)
        block.register_forward_pre_hook(_divide_argument, with_kwargs=True)
    return block.divided_argument.divisor


def _divide_argument(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    # It is reached through the block that it is called for: a copy of the model has its own.
    name, divisor = block.divided_argument.argument, block.divided_argument.divisor
    return args, {**kwargs, name: kwargs[name] / divisor}
