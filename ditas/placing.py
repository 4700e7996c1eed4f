"""Put what a recipe found into the module that it was found for."""
from dataclasses import asdict

import torch
from torch import nn

from architectures.registry import architecture_of
from ditas.backends import allowed_backend
from ditas.layouts import (
    Data,
    as_data,
    divided_arguments,
    layout_of,
    linears_with_row_scales,
    operand_layout,
)
from ditas.outcome import Outcome, outcome_of
from ditas.packing import PackedLinear, packed, packed_operands, put, welcome_adapters
from ditas.request import Request
from ditas.stowed import Arithmetic, Origin, StowedLinear
from errors import UserError
from quant.activations.attention import Operands
from quant.activations.quantisers import watch_timesteps
from quant.install import device_of, find_timestep_index, unnumbered
from quant.layers.fold import fold
from quant.layers.quantised import QuantizedLayer
from quant.pipeline import Result

# What linears become, by their names.
Layers = dict[str, QuantizedLayer]


def check_not_quantised(module: nn.Module) -> None:
    """Refuse a module that holds quantised linears.

    Raises:
        UserError: it does.
    """
    if any(isinstance(part, PackedLinear) for part in module.modules()):
        raise UserError(f"this {type(module).__name__} is quantised already: load it anew first")


def put_in(module: nn.Module, request: Request, result: Result) -> Outcome:
    """Put what was found into the module that it was found for; say what became of it."""
    outcome = outcome_of(module, request, result)
    give_new_values(module, result)
    put_layers(module, request, result.layers, result.operands)
    return outcome


def put_layers(
    module: nn.Module, request: Request, layers: Layers, operands: dict[str, Operands]
) -> None:
    """Fold the factors, and put quantised layers where linears were; ``layers`` is emptied.

    Of the linears' float weights only shape and type are looked at. Nothing is expanded to what
    computes it before it is called.
    """
    # Where factors fold, float parameters around the linears change.
    before = {name for name, _ in module.named_parameters()}
    folded = fold(module, layers)
    layers.clear()
    readers = readers_of(module)
    operands = {name: quantisers.fold() if folded[readers[name]].smoothing.is_none else quantisers
                for name, quantisers in operands.items()}
    added = [name.removesuffix(".bias") for name, _ in module.named_parameters()
             if name not in before and name.removesuffix(".bias") not in folded]

    # All is made before the first linear goes.
    index, device = find_timestep_index(folded, operands), unnumbered(device_of(module))
    if index is not None:
        index.to(device)
    arithmetic = Arithmetic(allowed_backend(request, device), index)
    linears = stowed_linears(module, folded, device, arithmetic)
    stored = {
        **stored_form(module, linears, added),
        "operands": {name: asdict(operand_layout(quantisers, readers[name]))
                     for name, quantisers in operands.items()},
        # The argument on which ranges depend; null: they do not.
        "clock": None if index is None else architecture_of(module).clock,
    }
    quantised_operands = packed_operands(operands, index, device)
    welcome_adapters()

    put(module, linears, quantised_operands)
    if index is not None:
        watch_timesteps(module, index, stored["clock"])
    if hasattr(module, "register_to_config"):
        # It is diffusers' own, which is thus installed.
        from ditas.hand_over import sign
        sign(module, request, stored)


def stowed_linears(
    module: nn.Module, layers: Layers, device: torch.device, arithmetic: Arithmetic
) -> dict[str, StowedLinear]:
    """Make what float linears of a module become, by their names; ``layers`` is emptied."""
    linears = {}
    for name in list(layers):
        layer, old = layers.pop(name), module.get_submodule(name)
        in_file = packed(layer, old.bias)
        linears[name] = StowedLinear(
            layout_of(layer, in_file), in_file, Origin.of(old), device, arithmetic)
    return linears


def stored_form(
    module: nn.Module, linears: dict[str, StowedLinear], added_biases: list[str]
) -> Data:
    """Describe a module with folded factors, so that a file of its tensors can be read."""
    return {
        "layouts": as_data({name: linear.layout for name, linear in linears.items()}),
        "added_biases": added_biases,
        "divided_arguments": divided_arguments(module),
        "row_scales": linears_with_row_scales(module),
    }


def give_new_values(module: nn.Module, result: Result) -> None:
    """Copy the parameters that folding may change (see ``unchanged_on_failure``)."""
    for name, parameter in module.named_parameters():
        if name.removesuffix(".weight") not in result.layers:
            parameter.data = parameter.data.clone()


def readers_of(module: nn.Module) -> dict[str, str]:
    """Name the linear that reads the averaged values of every attention."""
    architecture = architecture_of(module)
    first = {site.name: site.linears[0] for site in architecture.sites(module, "all")}
    return {attention.name: first[attention.output]
            for attention in architecture.attentions(module)}
