"""A group size for every site of a model (Q-DiT): what is tried, what is allowed, what it costs.

Evolution judges whole allocations: each is rounded to the nearest, and installed into a copy of the
model. An integer program adds up what each layer costs on its own; only what it finds is judged.
"""
import hashlib
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

import config
from architectures.sites import Site
from config import Recipe
from quant.calibration.trajectory import Trajectory, joint_weight
from quant.install import install
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.numerics.tokens import matrix_shape
from quant.parts import Parts, Task
from quant.recipe import weighs_layers
from quant.refinement.draws import Budget
from quant.refinement.evolution import Objective, Round, evolve
from quant.refinement.group_sizes import (
    Constraint,
    Groups,
    Sizes,
    bit_ops,
    bit_ops_at_most,
    group_choices,
    largest_up_to,
    mean_at_least,
)
from quant.refinement.integer_program import Costs, least_cost
from quant.refinement.sensitivity import COSTS


@dataclass(frozen=True)
class GroupSearch:
    """How group sizes are chosen.

    Attributes:
        objective: the loss of a quantised model.
        history: a file that keeps every evaluation, so that a search can go on after an
            interruption; None: nothing is kept.
    """

    objective: Objective
    history: Path | None = None


@dataclass(frozen=True)
class Allocation:
    """The group sizes that were chosen.

    Attributes:
        groups: by site.
        loss: of the judge.
        seconds: that the choice took; of integer programs without the judge, who has no part in it.
        history: the rounds of evolution; empty without it.
    """

    groups: Groups
    loss: float
    seconds: float
    history: tuple[Round, ...] = ()


def choose_group_sizes(
    task: Task,
    parts: Parts,
    smoothing: dict[str, Smoothing],
    trajectory: Trajectory | None,
    search: GroupSearch,
) -> Allocation:
    """Choose a group size for every site, as the recipe says.

    Raises:
        ValueError: no size divides any width, or as ``evolve`` and ``least_cost``.
    """
    recipe, bits = task.recipe, task.bits
    shapes = {site.name: _joint_shape(site, task.model) for site in task.sites}
    choices = _choices(shapes, recipe)
    allowed = _constraint(recipe, choices, shapes, (bits.weights, bits.activations))
    drafts = Drafts(task, parts, smoothing)

    def loss_of(groups: Groups) -> float:
        return search.objective.loss(install(deepcopy(task.model), drafts.layers(groups)))

    started = time.perf_counter()
    if weighs_layers(recipe):
        groups = least_cost(drafts.costs(choices), allowed)
        seconds = time.perf_counter() - started
        return Allocation(groups, loss_of(groups), seconds)
    text = (f"{asdict(recipe)} W{bits.weights}A{bits.activations}, "
            f"{search.objective.description}, {_digest(task, trajectory)}")
    history = None if search.history is None else _file_for(search.history, text)
    result = evolve(choices, loss_of, allowed, _budget(recipe), history, text)
    return Allocation(result.groups, result.loss, time.perf_counter() - started, result.history)


@dataclass(frozen=True)
class Drafts:
    """Sites at any group size, for a quick look: their weights are rounded to the nearest."""

    task: Task
    parts: Parts
    smoothing: dict[str, Smoothing]

    def layers(self, groups: Groups) -> dict[str, QuantizedLayer]:
        """Quantise all sites."""
        layers = {}
        for site in self.task.sites:
            for name, layer in self.layers_of(site, groups[site.name]).items():
                layers[name] = self.task.beside_the_model(layer)
        return layers

    def layers_of(self, site: Site, group: int) -> dict[str, QuantizedLayer]:
        """Quantise the linears of a site."""
        smoothing = self.smoothing[site.name]
        act = self.parts.activations.finish(site, smoothing, group)
        weights = self.parts.weights.draft(site, smoothing, group)
        return {name: QuantizedLayer(weight, act, smoothing) for name, weight in weights.items()}

    def costs(self, choices: dict[str, Sizes]) -> Costs:
        """Compute what each site costs on its own, at every size it can have."""
        costs: Costs = {}
        for site in tqdm(self.task.sites, desc="group sizes", unit="layer"):
            costs[site.name] = {size: self._cost(site, size) for size in choices[site.name]}
        return costs

    def _cost(self, site: Site, group: int) -> float:
        smoothing, cost = self.smoothing[site.name], COSTS[self.task.recipe.allocate]
        inputs = smoothing.of_input(self.parts.sensitivity.inputs(site))
        total = 0.0
        for name, layer in self.layers_of(site, group).items():
            weight = smoothing.of_weight(self.task.weight(name))
            total += cost(inputs, weight, layer)
        return total


def _joint_shape(site: Site, model: nn.Module) -> tuple[int, int]:
    """Return the shape (O, I) of the weights of a site's linears, stacked."""
    shapes = [matrix_shape(model.get_submodule(name)) for name in site.linears]
    return sum(rows for rows, _ in shapes), shapes[0][1]


def _choices(shapes: dict[str, tuple[int, int]], recipe: Recipe) -> dict[str, Sizes]:
    widths = {name: columns for name, (_, columns) in shapes.items()}
    sizes, tail = recipe.group_sizes, recipe.group_tail == "allow"
    if not tail and not any(width % size == 0 for width in widths.values() for size in sizes):
        raise ValueError(f"none of the group sizes {sizes} divides a layer's width: "
                         f"expected divisors of {sorted(set(widths.values()))}")
    return group_choices(widths, sizes, tail)


def _budget(recipe: Recipe) -> Budget:
    population = recipe.population
    return Budget(
        population=population,
        parents=max(1, round(config.evolution_parents * population)),
        crossovers=int(config.evolution_crossovers * population),
        mutations=int(config.evolution_mutations * population),
        probability=config.evolution_probability,
        rounds=recipe.generations,
        seed=0)


def _constraint(
    recipe: Recipe,
    choices: dict[str, Sizes],
    shapes: dict[str, tuple[int, int]],
    bits: tuple[int, int],
) -> Constraint:
    means = [sum(sizes) / len(sizes) for sizes in choices.values()]
    mean = config.mean_group_share * sum(means) / len(choices)
    if recipe.constraint == "mean":
        return mean_at_least(mean)
    # The paper's: no more bit operations than one size, as large as that mean, would cost.
    uniform = {name: largest_up_to(mean, sizes) for name, sizes in choices.items()}
    return bit_ops_at_most(bit_ops(uniform, shapes, *bits), shapes, *bits)


def _file_for(history: Path, text: str) -> Path:
    """Give each set of settings a file of its own."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return history.with_name(f"{history.stem}-{digest}{history.suffix}")


def _digest(task: Task, trajectory: Trajectory | None) -> str:
    """Tell models and calibration data apart."""
    sums = [_sums(joint_weight(site, task.weight)) for site in task.sites]
    if trajectory is not None:
        for call in trajectory.calls:
            main = call[trajectory.batched[0]] if trajectory.batched else call
            sums += [_sums(value) for value in pytree.tree_leaves(main)
                     if isinstance(value, Tensor)]
    digest = hashlib.sha256(torch.stack(sums).cpu().numpy().tobytes()).hexdigest()[:16]
    return f"weights and trajectory {digest}"


def _sums(values: Tensor) -> Tensor:
    values = values.double()
    return torch.stack([values.sum(), values.square().sum()])
