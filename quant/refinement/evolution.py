"""Evolutionary choice of a group size for every layer (Q-DiT, section 5.1, eq. 6, algorithm 1).

A layer's weight and input share one group size. The search looks for the sizes g of least loss
L(g), any number that the caller computes, among those that a constraint allows.
"""
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from torch import nn
from tqdm import tqdm

from quant.refinement.draws import Budget, Draws
from quant.refinement.group_sizes import Constraint, Groups, Sizes
from quant.refinement.history import Evaluated, HistoryFile


class Objective(Protocol):
    """The loss of a quantised model, by which group sizes are chosen."""

    description: str  # changes whenever the loss would

    def loss(self, model: nn.Module) -> float:
        """Return a number that is smaller for better models."""


@dataclass(frozen=True)
class Round:
    """What is known after a round.

    Attributes:
        best: the least loss so far.
        mean: the mean loss of the round's population.
    """

    best: float
    mean: float


@dataclass(frozen=True)
class SearchResult:
    """The best configuration, its loss, and the rounds that led there."""

    groups: Groups
    loss: float
    history: tuple[Round, ...]


def evolve(
    choices: dict[str, Sizes],
    loss_of: Callable[[Groups], float],
    allowed: Constraint,
    budget: Budget,
    history_path: Path | None = None,
    fingerprint_text: str = "",
) -> SearchResult:
    """Search for the allowed configuration of least loss (Q-DiT, algorithm 1); deterministic.

    The result is no worse than any allowed uniform allocation, because the first round holds all
    of them. A search that finds no more configurations ends early.

    Args:
        choices: the group sizes of each layer, as from ``group_choices``.
        loss_of: called once per configuration; equal configurations must have equal losses.
        allowed: the constraint; only what it allows is evaluated.
        history_path: a file that keeps every evaluation. Another call with it repeats the draws
            and takes the losses from there. So a run cut short ends as if it had not been, and one
            that was complete returns at once.
        fingerprint_text: what losses and constraint depend on, so that a file made with others is
            refused.

    Raises:
        ValueError: nothing is allowed; a loss is not finite; the file is damaged, of other
            settings, or cannot be written.
    """
    # What an earlier run evaluated, if this is to be kept.
    history_file = None
    if history_path is not None:
        settings = _settings(choices, budget, fingerprint_text)
        options = tuple(tuple(sizes) for sizes in choices.values())
        history_file = HistoryFile(history_path, settings, options)
    evaluations = Evaluations(tuple(choices), loss_of, history_file)
    draws = Draws(choices, allowed, budget)

    # Algorithm 1.
    rounds = []
    with evaluations.progress_bar(draws.at_most) as bar:
        for number in range(1, budget.rounds + 1):
            if number == 1:
                population = draws.first_round()
            else:
                population = draws.next_round(evaluations.best(budget.parents))
            if not population:
                break
            rounds.append(evaluations.add(number, population, bar))
        # Less than expected where the constraint leaves few.
        bar.total = bar.n
    return evaluations.result(rounds)


def _settings(choices: dict[str, Sizes], budget: Budget, fingerprint_text: str) -> dict:
    """Collect what a history file depends on, under the names that files have for it."""
    return {
        "about": fingerprint_text,
        **asdict(budget),
        "choices": [[name, list(sizes)] for name, sizes in choices.items()],
    }


class Evaluations:
    """The losses of all configurations so far.

    Args:
        names: of the layers.
        loss_of: as in ``evolve``.
        history_file: keeps the losses, and may know some from an earlier run; None keeps none.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        loss_of: Callable[[Groups], float],
        history_file: HistoryFile | None,
    ):
        self._names = names
        self._loss_of = loss_of
        self._history_file = history_file
        self._known: Evaluated = {} if history_file is None else history_file.read()
        self._losses: dict[Sizes, float] = {}

    def progress_bar(self, total: int) -> tqdm:
        """Start a bar that counts evaluations, those of earlier runs included."""
        return tqdm(
            total=total, initial=len(self._known), desc="group sizes", unit="configuration"
        )

    def best(self, count: int) -> list[Sizes]:
        """Return the configurations of least loss, best first; of equal ones the earlier."""
        return sorted(self._losses, key=self._losses.get)[:count]

    def add(self, number: int, population: list[Sizes], bar: tqdm) -> Round:
        """Evaluate the population of a round, unless the history file knows its losses."""
        for sizes in population:
            if sizes not in self._known:
                self._known[sizes] = number, self._evaluate(sizes)
                if self._history_file is not None:
                    self._history_file.write(self._known)
                bar.update()
            _, self._losses[sizes] = self._known[sizes]
            bar.set_postfix(round=number, best=min(self._losses.values()), refresh=False)
        mean = sum(self._losses[sizes] for sizes in population) / len(population)
        return Round(min(self._losses.values()), mean)

    def result(self, rounds: list[Round]) -> SearchResult:
        best = min(self._losses, key=self._losses.get)
        return SearchResult(dict(zip(self._names, best)), self._losses[best], tuple(rounds))

    def _evaluate(self, sizes: Sizes) -> float:
        loss = self._loss_of(dict(zip(self._names, sizes)))
        if not math.isfinite(loss):
            raise ValueError(f"the loss of group sizes {sizes} is {loss}, expected a finite number")
        return float(loss)
