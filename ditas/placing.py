"""Put what a recipe found into the module that it was found for."""
import torch
from torch import nn

from architectures.registry import architecture_of
from ditas.backends import choose_backend
from ditas.layouts import Data, as_data, divided_arguments, layout_of, linears_with_row_scales
from ditas.outcome import Outcome, outcome_of
from ditas.packing import PackedLinear, packed_linear, welcome_adapters
from ditas.request import Request
from errors import UserError
from quant.activations.attention import Operands
from quant.install import (
    device_of,
    find_timestep_index,
    make_modules,
    put_modules,
    unnumbered,
)
from quant.layers.fold import fold
from quant.layers.quantised import QuantizedLayer
from quant.pipeline import Result


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
    module: nn.Module,
    request: Request,
    layers: dict[str, QuantizedLayer],
    operands: dict[str, Operands],
) -> None:
    """Fold the factors, and put quantised layers where linears were.

    Of the linears' float weights only shape and type are looked at.
    """
    # Where factors fold, float parameters around the linears change.
    before = {name for name, _ in module.named_parameters()}
    layers = fold(module, layers)
    operands = folded_operands(module, layers, operands)
    added = [name.removesuffix(".bias") for name, _ in module.named_parameters()
             if name not in before and name.removesuffix(".bias") not in layers]

    # The modules that compute, beside what a file needs of them.
    index, device = find_timestep_index(layers, operands), unnumbered(device_of(module))
    kinds = names_by_type(module, layers)
    backend = choose_backend(request, list(layers.values()), next(iter(kinds)), device)
    computing = {}
    for kind, names in kinds.items():
        same = {name: layers[name] for name in names}
        computing |= make_modules(module, same, backend, kind, device, False, index)
    modules = {name: packed_linear(computing[name], layer, module.get_submodule(name))
               for name, layer in layers.items()}
    put_modules(module, modules, operands, index, device)
    welcome_adapters()

    if hasattr(module, "register_to_config"):
        # It is diffusers' own, which is thus installed.
        from ditas.hand_over import sign
        sign(module, request, None if index or operands else stored_form(module, layers, added))


def stored_form(
    module: nn.Module, layers: dict[str, QuantizedLayer], added_biases: list[str]
) -> Data:
    """Describe a quantised module, so that a file of its tensors can be read."""
    layouts = {name: layout_of(layer, module.get_submodule(name).in_file)
               for name, layer in layers.items()}
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


def folded_operands(
    module: nn.Module, layers: dict[str, QuantizedLayer], operands: dict[str, Operands]
) -> dict[str, Operands]:
    """Fold the quantisers of attentions whose values come divided now."""
    architecture = architecture_of(module)
    readers = {site.name: site.linears[0] for site in architecture.sites(module, "all")}
    outputs = {attention.name: readers[attention.output]
               for attention in architecture.attentions(module)}
    return {name: quantisers.fold() if layers[outputs[name]].smoothing.is_none else quantisers
            for name, quantisers in operands.items()}


def names_by_type(
    module: nn.Module, layers: dict[str, QuantizedLayer]
) -> dict[torch.dtype, list[str]]:
    """Sort the linears that become layers by the type of their numbers."""
    kinds: dict[torch.dtype, list[str]] = {}
    for name in layers:
        kinds.setdefault(module.get_submodule(name).weight.dtype, []).append(name)
    return kinds
