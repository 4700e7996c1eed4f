"""What a transformer of diffusers looks like inside, from its configuration alone.

The whole model is built without memory. What folds is proved on a copy with the small sizes of
``examples`` and everything else of the configuration; what was found in a block of the copy holds
for every block of the same linears.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from architectures.discover import Discovery, discover, find_blocks
from architectures.examples import Example, build, draw_call, examples_of
from architectures.sites import Site, place_of, single
from architectures.twins import extended

# The folder of diffusers that holds transformers.
TRANSFORMERS = "diffusers.models.transformers"


@dataclass(frozen=True)
class Inspection:
    """What is inside a model.

    Attributes:
        model: on the meta device.
        discovery: in it; its sites have no folds, whose numbers would be the copy's.
        places: where a site's factor goes, by its name, in words; of a site of a block that is
            not in here, the discovery's ``reasons`` say why it divides its input itself.
        warning: why nothing is known of folds; empty: it is.
    """

    model: nn.Module
    discovery: Discovery
    places: dict[str, str]
    warning: str = ""


def inspect(configuration: dict[str, Any]) -> Inspection:
    """Look into the transformer of a configuration file of diffusers.

    Raises:
        ValueError: it is no transformer of the installed diffusers, or has no repeated blocks.
    """
    name, fields = _class_and_fields(configuration)
    model = _empty(name, fields)
    blocks = tuple(find_blocks(model))
    warning = f"no call of {name} is known here, so that no fold could be proved"
    for example in examples_of(name):
        try:
            found = discover(build(_shrunk(example, fields)), draw_call(example))
            return _enlarged(found, model, blocks)
        except (ValueError, TypeError, RuntimeError) as error:
            first_line = str(error).partition("\n")[0]
            warning = f"no fold could be proved: {first_line}"
    plain = Discovery(blocks, tuple(plain_sites(model, blocks)), {})
    return Inspection(model, plain, {}, warning)


def _class_and_fields(configuration: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    import diffusers
    name = configuration.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise ValueError(f"'{name}' is no class of diffusers {diffusers.__version__}: "
                         "expected the config.json of a transformer")
    if not kind.__module__.startswith(TRANSFORMERS):
        raise ValueError(f"a {name} is no transformer: expected a model of {TRANSFORMERS}")
    fields = {key: value for key, value in configuration.items() if not key.startswith("_")}
    return name, fields


def _empty(name: str, fields: dict[str, Any]) -> nn.Module:
    """Build a model whose tensors take no memory.

    Raises:
        ValueError: the fields are none of this class.
    """
    import diffusers
    kind = getattr(diffusers, name)
    try:
        with torch.device("meta"):
            return kind.from_config(fields)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"this is no configuration of a {name}: {error}") from None


def _shrunk(example: Example, fields: dict[str, Any]) -> Example:
    """Give an example all that its sizes leave open in a configuration."""
    import diffusers
    known, _, _ = getattr(diffusers, example.class_name).extract_init_dict(fields)
    return replace(example, sizes={**known, **example.sizes})


def _enlarged(found: Discovery, model: nn.Module, blocks: tuple[str, ...]) -> Inspection:
    """Say of a large model what was found in a small one.

    Raises:
        ValueError: a block of the large one is like none of the small one.
    """
    twins = {block: _twin(block, model, found) for block in blocks}
    whole = extended(found, list(blocks), twins)
    names = dict(model.named_modules())
    sites = [site for site in whole.sites if all(name in names for name in site.linears)]
    places = {site.name: _place(site) for site in sites if site.block and site.folds}
    without_folds = tuple(replace(site, folds=()) for site in sites)
    return Inspection(model, replace(whole, sites=without_folds), places)


def _place(site: Site) -> str:
    """Name all that the factor of a block's site goes into, each once."""
    return ", ".join(dict.fromkeys(place_of(fold, site.block) for fold in site.folds))


def _twin(block: str, model: nn.Module, found: Discovery) -> str:
    """Find the block of a small model that has the same linears, the last of several."""
    ends = {name for name, module in model.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear)}
    place = block.rpartition(".")[0]
    for candidate in reversed(found.blocks):
        linears = {name.removeprefix(f"{candidate}.") for site in found.sites
                   if site.block == candidate for name in site.linears}
        if candidate.rpartition(".")[0] == place and linears == ends:
            return candidate
    raise ValueError(f"{block} is like no block of the small copy")


def plain_sites(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[Site]:
    """Make a site of every linear."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            block = next((block for block in blocks if name.startswith(f"{block}.")), None)
            yield single(name, "block" if block else "outside", block)
