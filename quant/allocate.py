"""Evolutionary choice of a group size for every layer (Q-DiT, section 5.1, equation 6 and algorithm 1).

A layer's weight and input share one group size. The search looks for the sizes g of least L(g), any number that the caller's
objective computes, among those that a constraint allows. Of the constraint one thing is assumed: what is allowed stays so when
groups grow, because larger groups are cheaper. So the largest groups are allowed if anything is, and any draw can be repaired.
"""
import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from quant.files import atomic

TRIES = 100  # draws per configuration wanted, before a round makes do with fewer
SCALE_BITS = 32  # partial sums and scales are float32

Groups = dict[str, int]  # layer -> group size
Constraint = Callable[[Groups], bool]
Sizes = tuple[int, ...]  # a configuration without the names, in the order of the layers


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


def group_choices(widths: dict[str, int], sizes: Iterable[int]) -> dict[str, Sizes]:
    """The group sizes that divide each layer's input width, ascending; the width itself where none does."""
    return {name: tuple(sorted({size for size in sizes if width % size == 0})) or (width,) for name, width in widths.items()}


def mean_group_size(groups: Groups) -> float:
    """Over layers, each counted once (what the published code constrains)."""
    return sum(groups.values()) / len(groups)


def bit_ops(groups: Groups, shapes: dict[str, tuple[int, int]], weight_bits: int, act_bits: int) -> int:
    """Bit operations per token of layers with weights (O, I), B(g) of equation 6.

    ``sum of O I weight_bits act_bits + O (I / g) 32^2``: the multiply-accumulates on codes and, per output and group, one in float32
    that scales the group's partial sum and adds it. The paper names BitOps and no formula: the second term, without which group
    sizes would cost nothing, is ours. Zero points are left out.
    """
    return sum(rows * columns * weight_bits * act_bits + rows * (columns // groups[name]) * SCALE_BITS ** 2
               for name, (rows, columns) in shapes.items())


def mean_at_least(minimum: float) -> Constraint:
    """The published code's stand-in for BitOps (there 128, with sizes from 32 to 288)."""
    return lambda groups: mean_group_size(groups) >= minimum


def bit_ops_at_most(limit: int, shapes: dict[str, tuple[int, int]], weight_bits: int, act_bits: int) -> Constraint:
    """Equation 6's constraint, with ``bit_ops``."""
    return lambda groups: bit_ops(groups, shapes, weight_bits, act_bits) <= limit


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
    stored = {} if history_path is None else _read(history_path, settings, options)

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
                        _write(history_path, settings, stored)
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


def _write(path: Path, settings: dict, stored: dict[Sizes, tuple[int, float]]) -> None:
    rows = [[number, loss, sizes] for sizes, (number, loss) in stored.items()]
    try:
        with atomic(path, durable=True) as temporary:
            temporary.write_text(json.dumps({**settings, "evaluated": rows}))
    except OSError as error:
        raise ValueError(f"cannot write '{path}': {error.strerror}; give another file") from None


def _read(path: Path, settings: dict, options: tuple[Sizes, ...]) -> dict[Sizes, tuple[int, float]]:
    """Round and loss of every configuration in the file; a file that is not there is begun, to fail now rather than later."""
    if not path.exists():
        _write(path, settings, {})
        return {}
    try:
        found = json.loads(path.read_text())
        rows = {tuple(sizes): (number, loss) for number, loss, sizes in found.pop("evaluated")}
        sound = found.keys() == settings.keys() and all(isinstance(number, int) and isinstance(loss, float) and math.isfinite(loss)
                                                        for number, loss in rows.values())
        changed = [key for key in settings if found[key] != settings[key]]
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}; give another file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound, changed = False, []
    if changed:
        phrases = ["other layers or group sizes" if key == "choices" else f"{key} is {found[key]!r} there, {settings[key]!r} now" for key in changed]
        raise ValueError(f"'{path}' holds a search with other settings ({'; '.join(phrases)}): give the same, another file, or delete it to "
                         "start anew")
    if not sound or any(len(sizes) != len(options) or not all(map(tuple.__contains__, options, sizes)) for sizes in rows):
        raise ValueError(f"'{path}' is damaged: give another file, or delete it to start the search anew")
    return rows
