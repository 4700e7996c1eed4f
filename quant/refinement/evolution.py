"""Evolutionary choice of a group size for every layer (Q-DiT, section 5.1, equation 6 and algorithm 1).

A layer's weight and input share one group size. The search looks for the sizes g of least L(g), any number that the caller's
objective computes, among those that a constraint allows. Of the constraint one thing is assumed: what is allowed stays so when
groups grow, because larger groups are cheaper. So the largest groups are allowed if anything is, and any draw can be repaired.
"""
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from torch import nn
from tqdm import tqdm

from quant.refinement.group_sizes import Constraint, Groups, Sizes
from quant.refinement.history import read_history, write_history

TRIES = 100  # draws per configuration wanted, before a round makes do with fewer


class Objective(Protocol):
    """The loss of a quantised model, by which group sizes are chosen."""

    description: str  # changes whenever the loss would

    def loss(self, model: nn.Module) -> float:
        """Return a number that is smaller for better models."""


@dataclass(frozen=True)
class Budget:
    """Effort of a search: at most ``rounds * population`` evaluations.

    Attributes:
        population: configurations per round; random ones fill up what crossovers and mutations leave.
        parents: the best configurations so far, from which the next round descends (K of the paper's top-K set).
        crossovers, mutations: children per round of either kind; the paper has half a population each.
        probability: with which a mutation draws a layer's size anew.
        rounds: populations evaluated, the first one included.
        seed: of all draws.

    Raises:
        ValueError: the numbers do not fit together.
    """

    population: int
    parents: int
    crossovers: int
    mutations: int
    probability: float
    rounds: int
    seed: int

    def __post_init__(self):
        if min(self.population, self.parents, self.rounds) < 1 or min(self.crossovers, self.mutations) < 0:
            raise ValueError(f"population, parents and rounds must be at least 1, crossovers and mutations at least 0: got {self}")
        if self.crossovers + self.mutations > self.population:
            raise ValueError(f"{self.crossovers} crossovers and {self.mutations} mutations exceed a population of {self.population}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"mutation probability {self.probability}, expected 0 to 1")


@dataclass(frozen=True)
class Round:
    """What is known after a round: the least loss so far, the mean loss of the round's population, the mean group size of the best."""

    best: float
    mean: float
    mean_group_size: float


@dataclass(frozen=True)
class Result:
    """The best configuration, its loss, and the rounds that led there."""

    groups: Groups
    loss: float
    history: tuple[Round, ...]


def evolve(choices: dict[str, Sizes], objective: Callable[[Groups], float], allowed: Constraint, budget: Budget,
           history_path: Path | None = None, about: str = "") -> Result:
    """Search for the allowed configuration of least loss; deterministic.

    The first round holds the uniform allocations, each layer with its largest choice up to one size, so that the result is no
    worse than any of them, and random ones. Later rounds hold configurations that no round had before. A search that finds no
    more of them ends early.

    Args:
        choices: the group sizes of each layer, as from ``group_choices``.
        objective: called once per configuration; equal configurations must have equal losses.
        allowed: the constraint; only what it allows is evaluated.
        history_path: a file that keeps every evaluation. Another call with it repeats the draws and takes the losses from there, so
            that a run cut short ends as if it had not been, and one that was complete returns at once.
        about: what objective and constraint depend on, so that a file made with others is refused.

    Raises:
        ValueError: nothing is allowed; a loss is not finite; the file is damaged, of other settings, or cannot be written.
    """
    names, options = tuple(choices), tuple(map(tuple, choices.values()))
    chance, seen = random.Random(budget.seed), set()
    settings = {"about": about, **asdict(budget), "choices": [[name, list(sizes)] for name, sizes in choices.items()]}
    stored = {} if history_path is None else read_history(history_path, settings, options)

    def fits(sizes: Sizes) -> bool:
        return allowed(dict(zip(names, sizes)))

    def fresh(sizes: Sizes) -> bool:
        if sizes in seen or not fits(sizes):
            return False
        seen.add(sizes)
        return True

    def take(count: int, draw: Callable[[], Sizes]) -> list[Sizes]:
        return list(islice(filter(fresh, (draw() for _ in range(TRIES * count))), count))

    if not fits(tuple(map(max, options))):
        raise ValueError("no group sizes are allowed, not even the largest of every layer: loosen the constraint or offer larger groups")
    losses: dict[Sizes, float] = {}
    history = []
    with tqdm(total=min(budget.rounds * budget.population, math.prod(map(len, options))), initial=len(stored), desc="group sizes",
              unit="configuration") as bar:
        for number in range(1, budget.rounds + 1):
            if losses:
                parents = sorted(losses, key=losses.get)[:budget.parents]
                population = take(budget.crossovers, lambda: _cross(parents, chance))
                population += take(budget.mutations, lambda: _mutated(parents, options, budget.probability, chance))
            else:
                population = list(islice(filter(fresh, _uniform(options)), budget.population))
            population += take(budget.population - len(population), lambda: _random(options, fits, chance))
            if not population:
                break
            for sizes in population:
                if sizes not in stored:
                    stored[sizes] = number, _finite(objective(dict(zip(names, sizes))), sizes)
                    if history_path is not None:
                        write_history(history_path, settings, stored)
                    bar.update()
                losses[sizes] = stored[sizes][1]
                bar.set_postfix(round=number, best=min(losses.values()), refresh=False)
            best = min(losses, key=losses.get)
            history.append(Round(losses[best], sum(losses[sizes] for sizes in population) / len(population), sum(best) / len(best)))
        bar.total = bar.n  # less than expected where the constraint leaves few
    return Result(dict(zip(names, best)), losses[best], tuple(history))


def _uniform(options: tuple[Sizes, ...]) -> Iterable[Sizes]:
    """For each size of any layer, largest first: every layer's largest choice up to it, or its least."""
    for size in sorted({size for sizes in options for size in sizes}, reverse=True):
        yield tuple(max((choice for choice in sizes if choice <= size), default=min(sizes)) for sizes in options)


def _random(options: tuple[Sizes, ...], fits: Callable[[Sizes], bool], chance: random.Random) -> Sizes:
    """Any sizes, then the largest for one layer after another, in random order, until they are allowed.

    Rejection alone fails under BitOps: of 112 layers with uniform draws next to none costs as little as groups of 128 do.
    """
    drawn = [chance.choice(sizes) for sizes in options]
    for layer in chance.sample(range(len(options)), len(options)):
        if fits(tuple(drawn)):
            break
        drawn[layer] = max(options[layer])
    return tuple(drawn)


def _cross(parents: list[Sizes], chance: random.Random) -> Sizes:
    """Every layer from one of two parents."""
    return tuple(map(chance.choice, zip(*chance.choices(parents, k=2))))


def _mutated(parents: list[Sizes], options: tuple[Sizes, ...], probability: float, chance: random.Random) -> Sizes:
    """A parent with layers drawn anew."""
    return tuple(chance.choice(sizes) if chance.random() < probability else size for size, sizes in zip(chance.choice(parents), options))


def _finite(loss: float, sizes: Sizes) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"the loss of group sizes {sizes} is {loss}, expected a finite number")
    return float(loss)


