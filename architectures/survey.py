"""Print what folds in the transformers of the installed diffusers, at the sizes of ``examples``.

    python -m architectures.survey
    python -m architectures.survey FluxTransformer2DModel WanTransformer3DModel
"""
import sys
import time
from collections import Counter
from dataclasses import dataclass

from architectures.discover import Discovery, discover
from architectures.examples import EXAMPLES, Example, build, draw_call
from architectures.sites import SharedModulation, Site

HEADER = ("class", "blocks", "sites", "linears", "into weights", "by the vector", "at run time",
          "why not", "seconds")


@dataclass(frozen=True)
class Row:
    """What was found in one class.

    Attributes:
        counts: of linears by where their factor goes: ``weights``, ``vector``, ``run time``.
        reasons: why linears divide at run time, with their number.
        seconds: of processor time, on one thread.
        failure: why nothing was found; empty: something was.
    """

    name: str
    blocks: int
    sites: int
    counts: Counter[str]
    reasons: Counter[str]
    seconds: float
    failure: str = ""

    @property
    def linears(self) -> int:
        return self.counts.total()

    def cells(self) -> tuple[str, ...]:
        if self.failure:
            return (self.name, *"------", self.failure, f"{self.seconds:.0f}")
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        numbers = (self.blocks, self.sites, self.linears, self.counts["weights"],
                   self.counts["vector"], self.counts["run time"])
        return (self.name, *map(str, numbers), reasons, f"{self.seconds:.0f}")


def place_of(site: Site) -> str:
    """Say where a site's factor goes: ``weights``, ``vector`` or ``run time``."""
    if not site.folds:
        return "run time"
    by_vector = any(isinstance(place, SharedModulation) for place in site.folds)
    return "vector" if by_vector else "weights"


def survey(example: Example) -> Row:
    """Find what folds in one class."""
    start = time.process_time()
    try:
        found = discover(build(example), draw_call(example))
    except ValueError as error:
        seconds = time.process_time() - start
        return Row(example.name, 0, 0, Counter(), Counter(), seconds, str(error))
    return row_of(example.name, found, time.process_time() - start)


def row_of(name: str, found: Discovery, seconds: float) -> Row:
    """Count what was found."""
    counts, reasons = Counter(), Counter()
    sites = found.scope("blocks")
    for site in sites:
        counts[place_of(site)] += len(site.linears)
        if site.name in found.reasons:
            reasons[found.reasons[site.name]] += len(site.linears)
    return Row(name, len(found.blocks), len(sites), counts, reasons, seconds)


def without_example() -> list[str]:
    """Name the transformers of the installed diffusers that nobody knows how to call here."""
    from diffusers import ModelMixin
    from diffusers.models import transformers
    names = {name for name, kind in vars(transformers).items()
             if isinstance(kind, type) and issubclass(kind, ModelMixin)}
    return sorted(names - {example.class_name for example in EXAMPLES})


def main(names: list[str]) -> None:
    """Print a table of the classes that are named, or of all, as Markdown."""
    examples = [example for example in EXAMPLES if not names or example.class_name in names]
    _print(HEADER)
    _print(("---",) * len(HEADER))
    rows = []
    for example in examples:
        rows.append(survey(example))
        _print(rows[-1].cells())
    counts = sum((row.counts for row in rows), Counter())
    if counts.total():
        folded = counts["weights"] + counts["vector"]
        print(f"\n{folded} of {counts.total()} linears of the blocks fold "
              f"({100 * folded / counts.total():.0f} %)")
    if not names:
        print(f"\nnot looked into: {', '.join(without_example())}")


def _print(cells: tuple[str, ...]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
