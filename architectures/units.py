"""Which layers of a transformer are reconstructed together, unit by unit."""
from functools import partial

from torch import Tensor, nn

from architectures.sites import MODEL, Architecture, Call, Site, Unit, linears_of
from architectures.tracing import tensors_of


def units(architecture: Architecture, model: nn.Module, kind: str) -> list[Unit]:
    """List the units of a model in forward order; ``kind`` is one of ``config.UNITS``."""
    sites = architecture.sites(model, "all")
    if kind == "blocks":
        return _blocks(architecture, model, sites)
    if kind == "temporal":
        temporal = architecture.temporal(model)
        first = Unit("timestep", tuple(temporal), MODEL, architecture.run_temporal)
        others = [site for site in sites if set(temporal).isdisjoint(site.linears)]
        return [first, *_blocks(architecture, model, others)]
    first = next(i for i, site in enumerate(sites) if site.block is not None)
    return [*single_layers(sites[:first]), *_blocks(architecture, model, sites),
            *architecture.output_units(model)]


def module_unit(name: str, linears: tuple[str, ...], **fields) -> Unit:
    """Describe a module with everything in it; ``fields`` are those of ``Unit``."""
    return Unit(name, linears, entrance=name, run=partial(_run_module, name), **fields)


def single_layers(sites: list[Site]) -> list[Unit]:
    """Make a unit of every linear."""
    return [module_unit(name, (name,)) for name in linears_of(sites)]


def _blocks(architecture: Architecture, model: nn.Module, sites: list[Site]) -> list[Unit]:
    """Make a unit of every block, with those of its linears that are among the sites."""
    names = architecture.blocks(model)
    attentions = [site.name for site in architecture.attentions(model)]
    blocks = []
    for name in names:
        linears = linears_of([site for site in sites if site.block == name])
        inside = tuple(attention for attention in attentions if attention.startswith(f"{name}."))
        advance = None if name == names[-1] else architecture.advance
        blocks.append(module_unit(name, tuple(linears), attentions=inside, advance=advance))
    return blocks


def _run_module(name: str, model: nn.Module, call: Call) -> tuple[Tensor, ...]:
    return tuple(tensors_of(model.get_submodule(name)(**call)))
