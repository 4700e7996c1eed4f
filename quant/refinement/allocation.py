"""A group size for every site of a model (Q-DiT): what is tried, what is allowed, what it costs.

Each candidate allocation is rounded to the nearest, installed into a copy of the model and judged.
"""
import hashlib
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import config
from config import Recipe
from quant.calibration.trajectory import Trajectory, joint_weight
from quant.install import install
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.parts import Parts, Task
from quant.refinement.draws import Budget
from quant.refinement.evolution import Objective, SearchResult, evolve
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


def choose_group_sizes(
    task: Task,
    parts: Parts,
    smoothing: dict[str, Smoothing],
    trajectory: Trajectory | None,
    search: GroupSearch,
) -> SearchResult:
    """Choose a group size for every site by evolution.

    Raises:
        ValueError: no size divides any width, or as ``evolve``.
    """
    recipe, bits = task.recipe, task.bits
    shapes = {site.name: tuple(joint_weight(task.model, site).shape) for site in task.sites}
    choices = _choices(shapes, recipe.group_sizes)

    def loss_of(groups: Groups) -> float:
        layers: dict[str, QuantizedLayer] = {}
        for site in task.sites:
            group = groups[site.name]
            act = parts.activations.finish(site, smoothing[site.name], group)
            weights = parts.weights.draft(site, smoothing[site.name], group)
            layers |= {name: QuantizedLayer(weight, act, smoothing[site.name])
                       for name, weight in weights.items()}
        return search.objective.loss(install(deepcopy(task.model), layers))

    allowed = _constraint(recipe, choices, shapes, (bits.weights, bits.activations))
    text = (f"{asdict(recipe)} W{bits.weights}A{bits.activations}, "
            f"{search.objective.description}, {_digest(task, trajectory)}")
    history = None if search.history is None else _file_for(search.history, text)
    return evolve(choices, loss_of, allowed, _budget(recipe), history, text)


def _choices(shapes: dict[str, tuple[int, int]], sizes: tuple[int, ...]) -> dict[str, Sizes]:
    widths = {name: columns for name, (_, columns) in shapes.items()}
    if not any(width % size == 0 for width in widths.values() for size in sizes):
        raise ValueError(f"none of the group sizes {sizes} divides a layer's width: "
                         f"expected divisors of {sorted(set(widths.values()))}")
    return group_choices(widths, sizes)


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
    seen = [joint_weight(task.model, site) for site in task.sites]
    if trajectory is not None:
        main = trajectory.batched[0]
        seen += [call[main] for call in trajectory.calls]
    sums = torch.stack([_sums(values.double()) for values in seen])
    digest = hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()[:16]
    return f"weights and trajectory {digest}"


def _sums(values: Tensor) -> Tensor:
    return torch.stack([values.sum(), values.square().sum()])
