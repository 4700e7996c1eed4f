"""An architecture of which the user chose what is quantised."""
import re
from dataclasses import dataclass

from torch import Tensor, nn

from architectures.sites import Architecture, AttentionSite, Call, Site, Unit


@dataclass(frozen=True)
class SelectedArchitecture:
    """Another architecture with some sites more, and some less.

    Attributes:
        include: expression of linears that are quantised whatever the scope; empty: none.
        exclude: expression of linears that are not, nor what shares their input; empty: none.
    """

    base: Architecture
    include: str
    exclude: str

    def sites(self, model: nn.Module, scope: str) -> list[Site]:
        inside = set(self.base.sites(model, scope))
        return [site for site in self.base.sites(model, "all")
                if is_chosen(site, site in inside, self.include, self.exclude)]

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        names = {site.name for site in self.sites(model, "all")}
        return [attention for attention in self.base.attentions(model)
                if attention.output in names]

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def batched(self) -> tuple[str, ...]:
        return self.base.batched

    @property
    def clock(self) -> str:
        return self.base.clock

    @property
    def advance(self):
        return self.base.advance

    def blocks(self, model: nn.Module) -> list[str]:
        return self.base.blocks(model)

    def temporal(self, model: nn.Module) -> list[str]:
        return self.base.temporal(model)

    def run_temporal(self, model: nn.Module, call: Call) -> tuple[Tensor, ...]:
        return self.base.run_temporal(model, call)

    def output_units(self, model: nn.Module) -> list[Unit]:
        return self.base.output_units(model)


def is_chosen(site: Site, is_inside: bool, include: str, exclude: str) -> bool:
    """Tell whether a site is quantised.

    Args:
        is_inside: it belongs to the recipe's scope.
        include, exclude: as of ``SelectedArchitecture``.
    """
    return (is_inside or _matches(include, site)) and not _matches(exclude, site)


def _matches(expression: str, site: Site) -> bool:
    return bool(expression) and any(re.search(expression, name) for name in site.linears)
