"""What became of a module, site by site."""
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from architectures.explored import ExploredArchitecture
from architectures.registry import architecture_of
from architectures.selected import SelectedArchitecture
from architectures.sites import Architecture, Site, modulations, place_of
from ditas.packing import packed_bytes
from ditas.request import Request
from quant.layers.quantised import QuantizedLayer
from quant.numerics.spec import OFF_BITS
from quant.pipeline import Result

HEADER = ("site", "times", "bits", "factors", "MB before", "MB after")


@dataclass(frozen=True)
class SiteOutcome:
    """What became of the linears of a site.

    Attributes:
        site: its linears, block and folds.
        bits: such as ``W4A8``.
        factors: where the smoothing factors went: into which weights, or why the linears divide
            their input at run time; empty: there are none.
        alpha: the migration strength behind the factors; None where there is none.
        before, after: bytes of the weights, and of what is kept in their place.
    """

    site: Site
    bits: str
    factors: str
    alpha: float | None
    before: int
    after: int


@dataclass(frozen=True)
class Outcome:
    """What was done to a module; ``print`` shows a line for the same site of all blocks.

    Attributes:
        recipe: its name with the flags that were given.
        left: bytes of the parameters that were left alone.
    """

    recipe: str
    sites: tuple[SiteOutcome, ...]
    left: int

    def __str__(self) -> str:
        before, after = (self.left + sum(values) for values in zip(
            *((site.before, site.after) for site in self.sites)))
        linears = sum(len(outcome.site.linears) for outcome in self.sites)
        lines = [f"| {' | '.join(cells)} |" for cells in self._table()]
        return "\n".join([
            f"{self.recipe}: {linears} linears in {len(self.sites)} sites", *lines,
            f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after"])

    def _table(self) -> Iterator[tuple[str, ...]]:
        yield HEADER
        yield ("---",) * len(HEADER)
        rows: dict[tuple[str, ...], list[SiteOutcome]] = {}
        for outcome in self.sites:
            key = outcome.site.pattern, outcome.bits, outcome.factors
            rows.setdefault(key, []).append(outcome)
        for (name, bits, factors), same in rows.items():
            before, after = sum(row.before for row in same), sum(row.after for row in same)
            yield (name, str(len(same)), bits, factors,
                   f"{before / 1e6:.2f}", f"{after / 1e6:.2f}")


def outcome_of(module: nn.Module, request: Request, result: Result) -> Outcome:
    """Describe what becomes of a module that is still float."""
    architecture = architecture_of(module)
    reasons = reasons_of(architecture)
    sites = list(architecture.sites(module, request.recipe.scope))
    others = modulations(architecture.sites(module, "adaln"))
    sites += [site for site in others if site not in sites and site.linears[0] in result.layers]
    outcomes = tuple(_of_site(module, site, result, reasons) for site in sites)
    whole = sum(parameter.nbytes for parameter in module.parameters())
    return Outcome(request.label, outcomes, whole - sum(outcome.before for outcome in outcomes))


def reasons_of(architecture: Architecture) -> dict[str, str]:
    """Find out why sites do not fold, by name; of an architecture known by hand nothing is."""
    if isinstance(architecture, SelectedArchitecture):
        architecture = architecture.base
    is_explored = isinstance(architecture, ExploredArchitecture)
    return architecture.discovery.reasons if is_explored else {}


def _of_site(
    module: nn.Module, site: Site, result: Result, reasons: dict[str, str]
) -> SiteOutcome:
    layers = [result.layers[name] for name in site.linears]
    before = sum(module.get_submodule(name).weight.nbytes for name in site.linears)
    return SiteOutcome(
        site=site,
        bits=_bits(layers[0]),
        factors="" if layers[0].smoothing.is_none else _place(site, reasons),
        alpha=result.alphas.get(site.name),
        before=before,
        after=sum(packed_bytes(layer) for layer in layers))


def _bits(layer: QuantizedLayer) -> str:
    activations = OFF_BITS if layer.act is None else layer.act.spec.bits
    return f"W{layer.weight.base.spec.bits}A{activations}"


def _place(site: Site, reasons: dict[str, str]) -> str:
    if not site.folds:
        reason = reasons.get(site.name)
        return f"at run time ({reason})" if reason else "at run time"
    return ", ".join(dict.fromkeys(place_of(fold, site.block) for fold in site.folds))
