"""Which configurations of group sizes a search evaluates, round by round (see ``evolution``).

The constraint must be monotonic: enlarging any group keeps an allowed configuration allowed,
because larger groups are cheaper. So the largest groups are allowed if anything is, and any draw
can be repaired.
"""
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from quant.refinement.group_sizes import Constraint, Sizes, largest_up_to

TRIES = 100  # draws per configuration wanted, before a round makes do with fewer


@dataclass(frozen=True)
class Budget:
    """Effort of a search: at most ``rounds * population`` evaluations.

    Attributes:
        population: configurations per round; random ones fill up what crossovers and mutations
            leave.
        parents: the best configurations so far, from which the next round descends (K of the
            paper's top-K set).
        crossovers, mutations: children per round of either kind; the paper has half a population
            each.
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
        at_least_one = min(self.population, self.parents, self.rounds) >= 1
        if not at_least_one or min(self.crossovers, self.mutations) < 0:
            raise ValueError(
                "population, parents and rounds must be at least 1, "
                f"crossovers and mutations at least 0: got {self}"
            )
        if self.crossovers + self.mutations > self.population:
            raise ValueError(
                f"{self.crossovers} crossovers and {self.mutations} mutations "
                f"exceed a population of {self.population}"
            )
        if not 0 <= self.probability <= 1:
            raise ValueError(f"mutation probability {self.probability}, expected 0 to 1")


class Draws:
    """Draws configurations that the constraint allows and no round had before.

    Raises:
        ValueError: nothing is allowed.
    """

    def __init__(self, choices: dict[str, Sizes], allowed: Constraint, budget: Budget):
        self._names = tuple(choices)
        self._options = tuple(tuple(sizes) for sizes in choices.values())
        self._allowed = allowed
        self._budget = budget
        self._rng = random.Random(budget.seed)
        self._seen: set[Sizes] = set()
        largest = tuple(max(sizes) for sizes in self._options)
        if not self._is_allowed(largest):
            raise ValueError(
                "no group sizes are allowed, not even the largest of every layer: "
                "loosen the constraint or offer larger groups"
            )

    @property
    def at_most(self) -> int:
        """The number of configurations that all rounds can draw."""
        existing = math.prod(len(sizes) for sizes in self._options)
        return min(self._budget.rounds * self._budget.population, existing)

    def first_round(self) -> list[Sizes]:
        """Draw the uniform allocations, filled up with random configurations."""
        population = self._new(self._budget.population, uniform(self._options))
        return self._fill_up(population)

    def next_round(self, parents: list[Sizes]) -> list[Sizes]:
        """Draw children of the best configurations so far, filled up with random ones."""
        budget = self._budget
        crossed = self._tries(budget.crossovers, lambda: cross(parents, self._rng))
        population = self._new(budget.crossovers, crossed)
        mutated = self._tries(budget.mutations, lambda: self._mutate(parents))
        population += self._new(budget.mutations, mutated)
        return self._fill_up(population)

    def _fill_up(self, population: list[Sizes]) -> list[Sizes]:
        missing = self._budget.population - len(population)
        return population + self._new(missing, self._tries(missing, self._draw_allowed))

    @staticmethod
    def _tries(count: int, draw: Callable[[], Sizes]) -> Iterator[Sizes]:
        """Draw ``TRIES`` times for each of ``count`` configurations, as far as asked for."""
        for _ in range(TRIES * count):
            yield draw()

    def _new(self, count: int, drawn: Iterable[Sizes]) -> list[Sizes]:
        """Take the first ``count`` new configurations of those drawn, or fewer if there are."""
        new = []
        for sizes in drawn:
            if sizes not in self._seen and self._is_allowed(sizes):
                self._seen.add(sizes)
                new.append(sizes)
                # Not one draw more: it would change all that follow.
                if len(new) == count:
                    break
        return new

    def _is_allowed(self, sizes: Sizes) -> bool:
        return self._allowed(dict(zip(self._names, sizes)))

    def _mutate(self, parents: list[Sizes]) -> Sizes:
        return mutate(parents, self._options, self._budget.probability, self._rng)

    def _draw_allowed(self) -> Sizes:
        """Draw any sizes, then enlarge one layer after another until they are allowed.

        Rejection alone fails under BitOps: of 112 layers with uniform draws next to none costs as
        little as groups of 128 do.
        """
        drawn = [self._rng.choice(sizes) for sizes in self._options]
        layers = range(len(self._options))
        for layer in self._rng.sample(layers, len(layers)):
            if self._is_allowed(tuple(drawn)):
                break
            drawn[layer] = max(self._options[layer])
        return tuple(drawn)


def uniform(options: tuple[Sizes, ...]) -> Iterator[Sizes]:
    """Give every layer its largest choice up to one size, for each size there is, largest first."""
    for limit in sorted(set(chain.from_iterable(options)), reverse=True):
        yield tuple(largest_up_to(limit, sizes) for sizes in options)


def cross(parents: list[Sizes], rng: random.Random) -> Sizes:
    """Take every layer's size from one of two parents."""
    first, second = rng.choices(parents, k=2)
    return tuple(rng.choice(pair) for pair in zip(first, second))


def mutate(
    parents: list[Sizes], options: tuple[Sizes, ...], probability: float, rng: random.Random
) -> Sizes:
    """Draw the sizes of some layers of a parent anew."""
    child = list(rng.choice(parents))
    for layer, sizes in enumerate(options):
        if rng.random() < probability:
            child[layer] = rng.choice(sizes)
    return tuple(child)
