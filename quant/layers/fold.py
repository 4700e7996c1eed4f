"""Fold smoothing factors into the layers before, so that sampling divides less (DiTAS, 4.4).

Dividing the input of a linear behind a modulated LayerNorm is dividing shift and scale; dividing
what reads the values that attention averages is dividing V. Of a quantised weight only the scales
of its output channels change, never a code. Where a factor goes is said by the site's ``folds``.
"""
import inspect
from dataclasses import replace

import torch
from torch import Tensor, nn

from architectures.registry import architecture_of
from architectures.sites import (
    Entries,
    Fold,
    Modulation,
    Rows,
    SharedModulation,
    Site,
)
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import NO_SMOOTHING, Smoothing

Layers = dict[str, QuantizedLayer]

# The buffer of a float linear that says what its rows have been multiplied by. Nothing here uses
# it, but what is put beside the linear later, such as an adapter, has to be multiplied, too.
ROW_SCALES = "row_scales"


def fold(model: nn.Module, layers: Layers) -> Layers:
    """Divide each site's factors out where the model's architecture says (see ``fold_sites``)."""
    sites = architecture_of(model).sites(model, "blocks")
    # The model's last linear, which a scope may leave out, can stand in a block.
    return fold_sites(model, layers, [site for site in sites if site.linears[0] in layers])


@torch.no_grad()
def fold_sites(model: nn.Module, layers: Layers, sites: list[Site]) -> Layers:
    """Divide each site's factors out where its activation is made.

    Args:
        model: with float linears where ``layers`` are not installed yet. Its biases, norms, float
            modulation weights and tables change in place.
        layers: by name; stay as they are.

    Returns:
        The layers to install.
    """
    layers = dict(layers)
    for site in sites:
        smoothing = layers[site.linears[0]].smoothing
        if smoothing.is_none or not site.folds:
            continue
        if smoothing.shift is not None:
            _take_shift_out_of_biases(model, site, layers)
        for place in site.folds:
            _divide(model, layers, place, smoothing)
        for name in site.linears:
            layers[name] = replace(layers[name], smoothing=NO_SMOOTHING, folded=smoothing)
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
    elif isinstance(place, Entries):
        divide_entries(model, place, smoothing)
    else:
        divide_rows(model, layers, place, smoothing)


def divide_rows(model: nn.Module, layers: Layers, place: Rows, smoothing: Smoothing) -> None:
    """Divide output channels of a linear by the factors (D,), bias included."""
    factors = smoothing.factors
    if place.stop is not None:
        factors = factors[place.channel:place.channel + place.stop - place.start]
    _divide_weight_rows(model, layers, place.linear, place.rows, factors)
    bias = model.get_submodule(place.linear).bias
    if bias is not None:
        bias[place.rows] /= factors


def divide_entries(model: nn.Module, place: Entries, smoothing: Smoothing) -> None:
    """Divide entries of a parameter by the factors (D,)."""
    entries = model.get_parameter(place.parameter).view(-1)[place.start:place.stop]
    plus = int(place.is_scale)
    entries.copy_((entries + plus) / smoothing.factors - plus)


def divide_modulation(
    model: nn.Module, layers: Layers, place: Modulation, smoothing: Smoothing
) -> None:
    """Add the shift (D,) to ``x (1 + scale) + shift`` and divide by the factors (D,)."""
    factors, linear = smoothing.factors, model.get_submodule(place.linear)
    scale = _chunk(place.scale, len(factors))
    if linear.bias is None:
        # What is missing in ``scale`` stands beside a 1, and needs a bias to go to.
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), False)
    _divide_weight_rows(model, layers, place.linear, scale, factors)
    linear.bias[scale] = (1 + linear.bias[scale]) / factors - 1
    if place.shift is None:
        return
    shift = _chunk(place.shift, len(factors))
    _divide_weight_rows(model, layers, place.linear, shift, factors)
    if smoothing.shift is not None:
        linear.bias[shift] += smoothing.shift
    linear.bias[shift] /= factors


def divide_shared_modulation(
    model: nn.Module, place: SharedModulation, smoothing: Smoothing
) -> None:
    """Add the shift b (D,) to ``x (1 + scale) + shift`` and divide by the factors s (D,).

    Chunk c of the modulation is ``vector[c] + table[c]``: a vector (N, chunks D) that all blocks
    share, and this block's own table (chunks, D). The vector is divided where it enters the block:

        vector[c] <- vector[c] / s                        c: shift and scale
        table[shift] <- (table[shift] + b) / s
        table[scale] <- (1 + table[scale]) / s - 1

    Without a table, the vector takes the place of both:

        vector[shift] <- (vector[shift] + b) / s
        vector[scale] <- (1 + vector[scale]) / s - 1
    """
    factors, width = smoothing.factors, len(smoothing.factors)
    chunks = [chunk for chunk in (place.shift, place.scale) if chunk is not None]
    vector = argument_of(model.get_submodule(place.block), place.argument, factors.device)
    vector.reach(width * (max(chunks) + 1))
    for chunk in chunks:
        vector.divisor[_chunk(chunk, width)] *= factors
    if place.table is None:
        scale = _chunk(place.scale, width)
        vector.added[scale], vector.taken[scale] = 1, 1
        if place.shift is not None and smoothing.shift is not None:
            vector.added[_chunk(place.shift, width)] = smoothing.shift
        return
    table = model.get_parameter(place.table).view(-1, width)
    if place.shift is not None:
        if smoothing.shift is not None:
            table[place.shift] += smoothing.shift
        table[place.shift] /= factors
    table[place.scale] = (1 + table[place.scale]) / factors - 1


def _chunk(number: int, width: int) -> slice:
    return slice(number * width, (number + 1) * width)


def _divide_weight_rows(
    model: nn.Module, layers: Layers, name: str, rows: slice, factors: Tensor
) -> None:
    """Divide output channels of a linear, quantised or not, its bias aside."""
    if name in layers:
        layers[name] = layers[name].divide_rows(rows, factors)
    else:
        linear = model.get_submodule(name)
        linear.weight[rows] /= factors.view(-1, *(1,) * (linear.weight.ndim - 1))
        _row_scales(linear)[rows] /= factors


def _row_scales(linear: nn.Module) -> Tensor:
    """Return what the rows of a float linear have been multiplied by, (O,) float32."""
    if not hasattr(linear, ROW_SCALES):
        ones = torch.ones(len(linear.weight), device=linear.weight.device)
        linear.register_buffer(ROW_SCALES, ones)
    return getattr(linear, ROW_SCALES)


class DividedArgument(nn.Module):
    """Gives ``(x + added) / divisor - taken`` of the first chunks of a block's argument.

    The argument has shape (…, chunks D) or (…, chunks, D). Buffers ``added``, ``divisor`` and
    ``taken`` have an entry for every channel of those chunks.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.register_buffer("divisor", torch.ones(0, device=device))
        self.register_buffer("added", torch.zeros(0, device=device))
        self.register_buffer("taken", torch.zeros(0, device=device))

    def reach(self, count: int) -> None:
        """Make room for ``count`` entries; those that are new change nothing."""
        missing = max(0, count - len(self.divisor))
        self.divisor = torch.cat([self.divisor, self.divisor.new_ones(missing)])
        zeros = self.divisor.new_zeros(missing)
        self.added, self.taken = torch.cat([self.added, zeros]), torch.cat([self.taken, zeros])

    def forward(self, x: Tensor) -> Tensor:
        count = len(self.divisor)
        vectors = x if x.shape[-1] >= count else x.flatten(-2)  # (…, chunks D)
        # Whatever brings the block to the device of its inputs may do so only later.
        added, divisor, taken = (
            value.to(x.device) for value in (self.added, self.divisor, self.taken))
        divided = (vectors[..., :count] + added) / divisor - taken
        return torch.cat([divided.to(x.dtype), vectors[..., count:]], dim=-1).reshape(x.shape)


def argument_of(block: nn.Module, name: str, device: torch.device) -> DividedArgument:
    """Return what an argument of a block becomes, unchanged at first."""
    if not hasattr(block, "divided_arguments"):
        block.divided_arguments = nn.ModuleDict()
        block.register_forward_pre_hook(_divide_arguments, with_kwargs=True)
    if name not in block.divided_arguments:
        block.divided_arguments[name] = DividedArgument(device)
    return block.divided_arguments[name]


def _divide_arguments(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    # They are reached through the block that is called: a copy of the model has its own.
    divided = block.divided_arguments
    names = inspect.signature(block.forward).parameters

    def divide(name: str, value: object) -> object:
        return divided[name](value) if name in divided else value

    args = tuple(divide(name, value) for name, value in zip(names, args))
    return args, {name: divide(name, value) for name, value in kwargs.items()}
