"""The story of ``QuantDiT.py --inspect``: what is inside a folder, without its weights."""
import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from architectures.discover import Discovery
from architectures.inspection import Inspection, inspect
from architectures.selected import is_chosen
from architectures.sites import Site
from cards import DiT_models
from cli.hub import fetch_file, not_given
from cli.parser import refuse_flags
from cli.pipelines import INDEX, named_component
from cli.quantize_flags import make_parser
from cli.recipe_flags import bit_widths, build_recipe
from cli.values import expression, user_value
from config import Recipe
from errors import UserError
from quant.checkpoint.size import FLOAT_BITS, quantised_bits
from quant.numerics.spec import QuantSpec
from quant.recipe import (
    act_spec,
    adaln_spec,
    check_recipe,
    has_weight_only_adaln,
    weight_spec,
)

HEADER = ("site", "times", "weights", "folds into", "bits", "MB before", "MB after")
# What only quantising reads.
UNREAD = (
    "image_size", "num_classes", "ckpt", "vae", "seed", "num_sampling_steps", "cfg_scale",
    "class_labels", "svd", "report", "report_layers", "reference", "inception", "i3d", "export",
    "output", "prompts", "offload", "pipeline_args", "threads")
# The first of these that a pipeline has is looked at.
COMPONENTS = ("transformer", "transformer_2", "prior")


@dataclass(frozen=True)
class InspectSettings:
    """The checked command line of ``--inspect``."""

    configuration: dict[str, Any]  # of the transformer
    recipe: Recipe
    weight_bits: int
    act_bits: int
    include: str  # expression of linears that are quantised whatever the scope
    exclude: str  # of those that are not


@dataclass(frozen=True)
class Line:
    """What the table says of a site of one block, or of the same site of several."""

    name: str
    weights: str
    place: str
    bits: str
    before: int  # bytes
    after: int

    @property
    def key(self) -> tuple[str, ...]:
        return self.name, self.weights, self.place, self.bits


def inspect_settings(args: argparse.Namespace) -> InspectSettings:
    """Check the command line, and read the transformer's configuration.

    Raises:
        UserError: there is no configuration of a transformer, or a flag is out of range, has no
            effect on the table, or contradicts another.
    """
    if args.model is None:
        raise UserError("--inspect looks into a model of diffusers: give a folder with --model")
    refuse_flags(args, make_parser(), UNREAD, "quantising, and --inspect only looks")
    bits = bit_widths(args)
    recipe = build_recipe(args)
    user_value(check_recipe, recipe, bits.activations)
    return InspectSettings(
        recipe=recipe,
        weight_bits=bits.weights,
        act_bits=bits.activations,
        include=expression(args.include or "", "--include"),
        exclude=expression(args.exclude or "", "--exclude"),
        configuration=read_configuration(args.model, args.component),
    )


def read_configuration(place: str, component: str | None) -> dict[str, Any]:
    """Read the configuration of the transformer in a folder, or of one on the hub.

    Args:
        component: of a pipeline; None: the first that is a transformer.

    Raises:
        UserError: there is none.
    """
    folder = Path(place)
    if place in DiT_models:
        raise UserError(f"--inspect looks into models of diffusers, and {place} is one of this "
                        "repository: expected a folder or an id of the hub")
    is_folder = folder.is_dir()
    find = partial(_find_in_folder, folder) if is_folder else partial(fetch_file, place)
    index = find(INDEX)
    if index is None and component is not None:
        raise UserError(f"--component names a part of a pipeline, and '{place}' is none: drop it")
    part = "" if index is None else f"{_component(_read(index), place, component)}/"
    file = find(f"{part}config.json")
    if file is not None:
        return _read(file)
    if not is_folder:
        raise not_given(place, f"it has no {INDEX} and no config.json, or is not in the cache")
    raise UserError(f"'{place}' holds no {INDEX} and no config.json: expected the "
                    "folder of a diffusers pipeline or of its transformer")


def _find_in_folder(folder: Path, file: str) -> Path | None:
    return folder / file if (folder / file).exists() else None


def _component(index: dict[str, Any], place: str, given: str | None) -> str:
    if given is not None:
        return named_component(index, place, given)
    for name in COMPONENTS:
        if name in index:
            return name
    kind = index.get("_class_name", "pipeline")
    raise UserError(f"'{place}' is a {kind} without a transformer: expected a pipeline with one")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{file}': {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"'{file}' is no configuration: expected a JSON object")
    return content


def print_inspection(settings: InspectSettings) -> None:
    """Print the table of a model's sites, and its sums.

    Raises:
        UserError: the configuration is of no transformer, or it has no repeated blocks.
    """
    found = user_value(inspect, settings.configuration)
    chosen = chosen_sites(found.discovery, settings)
    lines = user_value(lambda: [line_of(site, site in chosen, found, settings)
                                for site in found.discovery.sites])
    if found.warning:
        print(f"warning: {found.warning}")
    print(f"{type(found.model).__name__}: {_of_lists(found.discovery.blocks)}")
    for cells in _table(lines):
        print(f"| {' | '.join(cells)} |")
    before, after = sum(line.before for line in lines), sum(line.after for line in lines)
    whole = sum(parameter.numel() for parameter in found.model.parameters()) * FLOAT_BITS // 8
    print(f"{_sum_of_folds(found, chosen)}; {whole / 1e6:.1f} MB before, "
          f"{(whole - before + after) / 1e6:.1f} MB after, at {FLOAT_BITS} bits elsewhere")


def chosen_sites(found: Discovery, settings: InspectSettings) -> set[Site]:
    """Find the sites that are quantised as the recipe says."""
    inside = set(found.scope(settings.recipe.scope))
    return {site for site in found.sites
            if is_chosen(site, site in inside, settings.include, settings.exclude)}


def line_of(
    site: Site, is_quantised: bool, found: Inspection, settings: InspectSettings
) -> Line:
    """Describe a site.

    Args:
        is_quantised: as the recipe says.

    Raises:
        ValueError: the recipe's groups do not fit its weights.
    """
    modules = [found.model.get_submodule(name) for name in site.linears]
    before = sum(module.weight.numel() for module in modules) * FLOAT_BITS // 8
    after, bits = before, "16"
    specs = [weight_spec_of(site, module, is_quantised, settings) for module in modules]
    if None not in specs:
        after = sum(quantised_bits(module, spec) for module, spec in zip(modules, specs)) // 8
        bits = f"W{specs[0].bits}A{_act_bits(site, is_quantised, settings)}"
    place = _place(site, found) if is_quantised else "-"
    return Line(site.pattern, _shapes(modules), place, bits, before, after)


def weight_spec_of(
    site: Site, module: nn.Module, is_quantised: bool, settings: InspectSettings
) -> QuantSpec | None:
    """Say how a site's weight is quantised; None: it is not."""
    recipe = settings.recipe
    if is_quantised:
        return weight_spec(recipe, settings.weight_bits)
    is_weight_only = (site.role == "modulation"
                      and has_weight_only_adaln(recipe, settings.weight_bits))
    if is_chosen(site, is_weight_only, settings.include, settings.exclude):
        return adaln_spec(recipe.adaln_bits, module.in_features)
    return None


def _act_bits(site: Site, is_quantised: bool, settings: InspectSettings) -> int:
    if not is_quantised:
        return FLOAT_BITS
    return act_spec(settings.recipe, settings.act_bits, site.per_image).bits


def _shapes(modules: list[nn.Module]) -> str:
    shapes = ["x".join(map(str, module.weight.shape)) for module in modules]
    unique = dict.fromkeys(shapes)
    return ", ".join(f"{shapes.count(shape)} of {shape}" for shape in unique)


def _place(site: Site, found: Inspection) -> str:
    if site.role != "block":
        return "-"
    reason = found.discovery.reasons.get(site.name, "unknown")
    return found.places.get(site.name, f"run time ({reason})")


def _table(lines: list[Line]) -> Iterator[tuple[str, ...]]:
    """Make rows of cells of lines that say the same of several blocks."""
    yield HEADER
    yield ("---",) * len(HEADER)
    for key in dict.fromkeys(line.key for line in lines):
        same = [line for line in lines if line.key == key]
        name, weights, place, bits = key
        before, after = sum(line.before for line in same), sum(line.after for line in same)
        yield (name, str(len(same)), weights, place, bits,
               f"{before / 1e6:.2f}", f"{after / 1e6:.2f}")


def _of_lists(blocks: tuple[str, ...]) -> str:
    lists = [block.rpartition(".")[0] for block in blocks]
    counts = [f"{lists.count(name)} in {name}" for name in dict.fromkeys(lists)]
    return f"{len(blocks)} blocks ({', '.join(counts)})"


def _sum_of_folds(found: Inspection, chosen: set[Site]) -> str:
    inside = [site for site in chosen if site.role == "block"]
    linears = sum(len(site.linears) for site in inside)
    folding = sum(len(site.linears) for site in inside if site.name in found.places)
    return f"{folding} of {linears} linears of the blocks fold"
