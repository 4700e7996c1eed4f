"""Put what a recipe found into the module that it was found for."""
from collections.abc import Callable
from dataclasses import asdict

from torch import nn

from architectures.registry import architecture_of
from ditas.backends import choose_backend
from ditas.layouts import (
    Data,
    as_data,
    divided_arguments,
    layout_of,
    linears_with_row_scales,
    operand_layout,
)
from ditas.outcome import Outcome, outcome_of
from ditas.packing import PackedLinear, Tensors, packed, put_operands, welcome_adapters
from ditas.request import Request
from errors import UserError
from quant.activations.attention import Operands
from quant.activations.quantisers import watch_timesteps
from quant.install import (
    device_of,
    find_timestep_index,
    make_modules,
    unnumbered,
)
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


def put_in(
    module: nn.Module, request: Request, result: Result, no_way_back: Callable[[], None]
) -> Outcome:
    """Put what was found into the module that it was found for; say what became of it.

    Args:
        no_way_back: called before the first linear goes.
    """
    outcome = outcome_of(module, request, result)
    give_new_values(module, result)
    put_layers(module, request, result.layers, result.operands, no_way_back)
    return outcome


def put_layers(
    module: nn.Module,
    request: Request,
    layers: Layers,
    operands: dict[str, Operands],
    no_way_back: Callable[[], None] = lambda: None,
) -> None:
    """Fold the factors, and put quantised layers where linears were; ``layers`` is emptied.

    Of the linears' float weights only shape and type are looked at. In memory each of them goes
    before the next layer is expanded to what computes it.
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

    # All that may be refused comes before the first linear goes.
    index, device = find_timestep_index(folded, operands), unnumbered(device_of(module))
    kinds = {name: module.get_submodule(name).weight.dtype for name in folded}
    backend = choose_backend(request, list(folded.values()), next(iter(kinds.values())), device)
    in_file = {name: packed(layer, module.get_submodule(name).bias)
               for name, layer in folded.items()}
    stored = {
        **stored_form(module, folded, in_file, added),
        "operands": {name: asdict(operand_layout(quantisers, readers[name]))
                     for name, quantisers in operands.items()},
        # The argument on which ranges depend; null: they do not.
        "clock": None if index is None else architecture_of(module).clock,
    }
    welcome_adapters()

    no_way_back()
    for name, kind in kinds.items():
        layer, old = {name: folded.pop(name)}, module.get_submodule(name)
        computing = make_modules(module, layer, backend, kind, device, False, index)[name]
        new = PackedLinear(computing, in_file.pop(name), old.weight.flatten(1).shape)
        module.set_submodule(name, new)
        del old
    put_operands(module, operands, index, device)
    if index is not None:
        watch_timesteps(module, index.to(device), stored["clock"])
    if hasattr(module, "register_to_config"):
        # It is diffusers' own, which is thus installed.
        from ditas.hand_over import sign
        sign(module, request, stored)


def stored_form(
    module: nn.Module, layers: Layers, in_file: dict[str, Tensors], added_biases: list[str]
) -> Data:
    """Describe a module with folded factors, so that a file of its tensors can be read."""
    layouts = {name: layout_of(layer, in_file[name]) for name, layer in layers.items()}
    return {
        "layouts": as_data(layouts),
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
