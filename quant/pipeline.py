"""A float model and a recipe in, quantised layers out: the order of a method's steps."""
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import config
from architectures.registry import architecture_of
from architectures.sites import Call, Site, modulations
from config import Recipe
from errors import Setting, SettingError
from quant.activations.attention import Operands
from quant.activations.quantisers import Activation
from quant.balancing.maxima import check_step
from quant.calibration.trajectory import Drive, record, replay
from quant.install import device_of
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.numerics.tokens import matrix_shape
from quant.numerics.uniform import check_groups
from quant.parts import (
    FirstPass,
    Parts,
    Task,
    WeightPart,
    build_parts,
    build_weights,
    observe,
    parts_without_trajectory,
    progress,
    quantize_first,
)
from quant.recipe import (
    BitWidths,
    adaln_spec,
    check_recipe,
    has_weight_only_adaln,
    is_tuned,
    learns_rounding,
    needs_trajectory,
    runs_quantised_so_far,
    weight_spec,
)
from quant.refinement.adaround import reconstruct
from quant.refinement.allocation import Allocation, GroupSearch, choose_group_sizes
from quant.refinement.evolution import Round
from quant.refinement.sequential import QuantisedSoFar, stages_of
from quant.refinement.tuning import tune
from quant.weights.low_rank import without_branch
from quant.weights.rounding import quantize_weight
from quant.weights.stowed import stow_weight


@dataclass
class Result:
    """Quantised layers by name, and what was found on the way (empty where a step is skipped).

    Attributes:
        operands: per attention, quantisers of its operands.
        absmax: per site (steps, I), maxima of the input at each step.
        smoothing: per site, its factors, with the losses of the search behind them.
        allocation: how group sizes were chosen; None where there is one.
    """

    layers: dict[str, QuantizedLayer]
    operands: dict[str, Operands] = field(default_factory=dict)
    absmax: dict[str, Tensor] = field(default_factory=dict)
    smoothing: dict[str, Smoothing] = field(default_factory=dict)
    allocation: Allocation | None = None

    @property
    def groups(self) -> dict[str, int]:
        """The group size that was chosen for every site; empty where there is one."""
        return {} if self.allocation is None else self.allocation.groups

    @property
    def evolution(self) -> tuple[Round, ...]:
        """The rounds in which group sizes were chosen; empty without evolution."""
        return () if self.allocation is None else self.allocation.history

    @property
    def alphas(self) -> dict[str, float]:
        """The migration strength of every site that has one."""
        return {name: smoothing.alpha for name, smoothing in self.smoothing.items()
                if smoothing.alpha is not None}

    @property
    def losses(self) -> dict[str, Tensor]:
        """The loss of every candidate, (A,) float64, for every site that was searched."""
        return {name: smoothing.losses for name, smoothing in self.smoothing.items()
                if smoothing.losses is not None}


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    bits: BitWidths,
    drive: Drive,
    svd: str = "fast",
    search: GroupSearch | None = None,
    device: torch.device | None = None,
) -> Result:
    """Quantise what the recipe's scope says. The model is left as it was.

    Args:
        model: float, in eval mode, on any device, of an architecture that ``architectures`` knows.
        drive: lets the model sample once; its calls are the calibration data.
        svd: the low-rank solver, a key of ``quant.weights.low_rank.SOLVERS``.
        search: how group sizes are chosen, if the recipe has several.
        device: where the inputs of the model are, which follows them (``quant.streaming``) if it
            lies elsewhere; None: where the model is.

    Returns:
        What was found, where the model is.

    Raises:
        ValueError: parts of the recipe do not go together, the model is unknown or gives non-finite
            values, or a group size does not fit a layer.
    """
    check_recipe(recipe, bits.activations)
    sites = architecture_of(model).sites(model, recipe.scope)
    task = Task(model, sites, recipe, bits, svd, device or device_of(model))
    check_task(task, search)
    # First pass: sample, and keep the model's calls and every input's maxima.
    bases = quantize_first(task) if task.quantizes_first else None
    first = sampled(task, drive)

    # Second pass: replay, and let every part of the recipe see what it asked for.
    weights = bases or build_weights(task, first.maxima)
    parts = _look(task, weights, first)
    smoothing = {site.name: parts.balance.finish(site) for site in sites}

    # What follows from it. An attention may be refused, so it comes before the weights' long work.
    operands = {name: task.beside_the_model(quantisers)
                for name, quantisers in parts.operands.finish(smoothing).items()}
    allocation = None
    if recipe.group_sizes:
        allocation = choose_group_sizes(task, parts, smoothing, first.trajectory, search)
    groups = {} if allocation is None else allocation.groups
    acts = {site.name: parts.activations.finish(site, smoothing[site.name], groups.get(site.name))
            for site in sites}

    # The weights, and what is learned or added afterwards.
    so_far = _quantised_so_far(task, first, acts, smoothing, operands)
    layers = _layers(task, parts, acts, smoothing, groups, so_far)
    if learns_rounding(recipe, bits):
        layers, operands = learn_rounding(task, first, layers, operands)
    if has_weight_only_adaln(recipe, bits.weights):
        layers |= weight_only_layers(task)
    if is_tuned(recipe, bits):
        layers = tune(model, layers, first.trajectory, recipe.tuning)
    return Result(layers, operands, first.maxima, smoothing, allocation)


def sampled(task: Task, drive: Drive) -> FirstPass:
    """Let the model sample, and keep its calls and every input's maxima, if a part needs them.

    Raises:
        ValueError: the recipe looks at a timestep that the trajectory does not have.
    """
    if not needs_trajectory(task.recipe, task.bits):
        return FirstPass(None, {})
    trajectory, maxima = record(task.model, task.sites, drive)
    check_step(task.recipe.timestep, len(trajectory))
    return FirstPass(trajectory, maxima)


def learn_rounding(
    task: Task, first: FirstPass, layers: dict[str, QuantizedLayer], operands: dict[str, Operands]
) -> tuple[dict[str, QuantizedLayer], dict[str, Operands]]:
    """Learn how weights are rounded, unit by unit."""
    # Every step is among them, unless the recipe draws steps normally.
    images = max(config.reconstruction_samples, len(first.trajectory))
    inputs = _drawn_call(first, task.recipe, images)
    return reconstruct(task.model, layers, operands, inputs, task.recipe)


def check_task(task: Task, search: GroupSearch | None) -> None:
    """Make sure that model and recipe go together, before any work is done.

    Raises:
        ValueError: they do not.
    """
    check_group_sizes(task, search)
    check_units(task)


def check_group_sizes(task: Task, search: GroupSearch | None) -> None:
    """Make sure that group sizes fit or can be chosen, before any work is done.

    Raises:
        ValueError: a size does not fit a layer, or there are several and no search.
    """
    if task.recipe.group_sizes:
        if search is None:
            raise ValueError("the recipe has several group sizes: give quantize_model a search, "
                             "which chooses among them")
        # The search takes those that fit each layer.
        return
    spec = weight_spec(task.recipe, task.bits.weights)
    for site in task.sites:
        for name in site.linears:
            check_groups(matrix_shape(task.model.get_submodule(name)), spec)


def check_units(task: Task) -> None:
    """Make sure that the model can be run in the units whose rounding is learned.

    Raises:
        ValueError: it cannot.
    """
    learned = learns_rounding(task.recipe, task.bits)
    is_temporal = learned and task.recipe.units == "temporal"
    if is_temporal and not architecture_of(task.model).temporal(task.model):
        raise SettingError(
            f"what the timestep decides in a {type(task.model).__name__} cannot be run on its own, "
            "which this recipe learns first: give ", Setting("units", "blocks", "whole"))


def _look(task: Task, weights: WeightPart, first: FirstPass) -> Parts:
    """Build the parts of the recipe and show them the trajectory, as far as they ask for it."""
    if first.trajectory is None:
        return parts_without_trajectory(task, weights)
    parts = build_parts(task, weights, first)
    watch = observe(parts, task.sites)
    if watch.modules:
        desc = "search" if len(task.recipe.alphas) > 1 else "replay"
        replay(task.model, first.trajectory, watch, config.replay_tokens, desc)
    return parts


def _quantised_so_far(
    task: Task,
    first: FirstPass,
    acts: dict[str, Activation],
    smoothing: dict[str, Smoothing],
    operands: dict[str, Operands],
) -> QuantisedSoFar | None:
    """Make the model that goes along with its quantisation, if the recipe looks at it."""
    if not runs_quantised_so_far(task.recipe, task.bits):
        return None
    inputs = _drawn_call(first, task.recipe, config.hessian_images)
    return QuantisedSoFar(task, acts, smoothing, operands, inputs)


def _layers(
    task: Task,
    parts: Parts,
    acts: dict[str, Activation],
    smoothing: dict[str, Smoothing],
    groups: dict[str, int],
    so_far: QuantisedSoFar | None,
) -> dict[str, QuantizedLayer]:
    """Quantise every weight, and combine it with its activation quantiser and smoothing."""
    layers = {}
    with progress(task.sites) as bar:
        for stage in _stages(task, parts, so_far):
            for site in stage:
                weights = parts.weights.finish(site, smoothing[site.name], groups.get(site.name))
                if so_far is not None:
                    so_far.put(weights)
                kept = without_search(smoothing[site.name])
                for name, weight in weights.items():
                    offset = _offset(task, name, smoothing[site.name])
                    layer = task.beside_the_model(
                        QuantizedLayer(weight, acts[site.name], kept, offset=offset))
                    layers[name] = replace(layer, weight=stow_weight(layer.weight))
                bar.update()
    return layers


def _offset(task: Task, name: str, smoothing: Smoothing) -> Tensor | None:
    """Compute what a shift adds to a linear's float product, (O,), if that is to be taken out."""
    if smoothing.shift is None or task.recipe.bias_correction == "quantised":
        return None
    # (W diag(s)) (shift / s), before W diag(s) is rounded.
    return task.weight(name) @ smoothing.shift


def _stages(task: Task, parts: Parts, so_far: QuantisedSoFar | None) -> Iterator[list[Site]]:
    """Yield the sites whose weights come next; what they look at is known by then."""
    if so_far is None:
        yield task.sites
        return
    for stage in stages_of(task.sites):
        parts.weights.take_moments(so_far.moments(stage))
        yield stage


def _drawn_call(first: FirstPass, recipe: Recipe, images: int) -> Call:
    """Draw images from the trajectory, on which the model is quantised unit by unit."""
    return first.trajectory.take(first.pick(images, recipe))


def without_search(smoothing: Smoothing) -> Smoothing:
    """Drop what a layer does not need: where the factors came from."""
    return Smoothing(smoothing.factors, smoothing.shift)


def weight_only_layers(task: Task) -> dict[str, QuantizedLayer]:
    """Quantise the modulation's weights alone; its inputs stay as they are."""
    layers = {}
    for site in _modulation_sites(task.model):
        for name in site.linears:
            weight = task.weight(name)
            spec = adaln_spec(task.recipe.adaln_bits, weight.shape[1])
            rounded = task.beside_the_model(without_branch(quantize_weight(weight, spec)))
            layers[name] = QuantizedLayer(stow_weight(rounded), act=None)
    return layers


def _modulation_sites(model: nn.Module) -> list[Site]:
    return modulations(architecture_of(model).sites(model, "adaln"))
