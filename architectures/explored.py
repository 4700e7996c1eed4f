"""Any transformer with repeated blocks as an architecture: what was found in one call of it."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from architectures.discover import Discovery, discover, find_blocks
from architectures.inspection import inspect, plain_sites
from architectures.sites import AttentionSite, Call, Site, Unit, per_image_linears
from architectures.temporal import Temporal, find_temporal
from architectures.twins import moved, renamed, shortened
from architectures.units import single_layers
from architectures.watched import watch


@dataclass(frozen=True)
class ExploredArchitecture:
    """A model whose blocks and sites were found; it names none of its modules itself.

    Attributes:
        discovery: blocks, sites and folds of the whole model.
        batched: arguments with an entry per image.
        clock: as of ``Architecture``.
        timestep: what it decides, as far as that was looked for.
    """

    discovery: Discovery
    batched: tuple[str, ...]
    clock: str
    timestep: Temporal = Temporal()

    name = "explored"
    # What enters a block is recorded.
    advance = None

    def sites(self, model: nn.Module, scope: str) -> list[Site]:
        return self.discovery.scope(scope)

    def blocks(self, model: nn.Module) -> list[str]:
        return list(self.discovery.blocks)

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        return list(self.discovery.attentions)

    def temporal(self, model: nn.Module) -> list[str]:
        return list(self.timestep.linears)

    def run_temporal(self, model: nn.Module, call: Call) -> tuple[Tensor, ...]:
        return self.timestep.run(model, call)

    def with_temporal(self, model: nn.Module, call: Call) -> "ExploredArchitecture":
        """Find out what the timestep decides, given arguments of the model's ``forward``."""
        candidates = per_image_linears(self.discovery.scope("all"))
        return replace(self, timestep=find_temporal(model, call, candidates))

    def output_units(self, model: nn.Module) -> list[Unit]:
        sites = self.discovery.sites
        last = max(number for number, site in enumerate(sites) if site.block is not None)
        return single_layers(sites[last + 1:])


def explore(
    model: nn.Module, call: Call, batched: tuple[str, ...], clock: str
) -> ExploredArchitecture:
    """Find out what is inside a model; it stays as it is.

    What folds is proved on a copy with two blocks of every kind, in float32, whose parameters are
    random. If its call cannot be traced, nothing folds.

    Args:
        model: in eval mode.
        call: arguments of its ``forward``, for at least two images.
        batched, clock: as in ``ExploredArchitecture``.

    Raises:
        ValueError: it has no repeated blocks, or none that reads tokens.
    """
    blocks = find_blocks(model)
    order = order_of_calls(model, call)
    blocks = [block for block in order if block in set(blocks)]
    try:
        traced = pytree.tree_map(_in_float32_on_the_cpu, call)
        found = discover_shortened(model, traced, blocks)
    except ValueError:
        # Its code looks at numbers, or does what no graph holds.
        found = watch(model, call, blocks)
    discovery = without_idle(found, set(order))
    if not discovery.scope("blocks"):
        raise ValueError(f"no linear of a block of {type(model).__name__} reads tokens")
    return ExploredArchitecture(discovery, batched, clock)


def discover_shortened(model: nn.Module, call: Call, blocks: list[str]) -> Discovery:
    """Discover what is inside a model, in fewer blocks of it if it runs with these.

    Raises:
        ValueError: its call cannot be traced.
    """
    short, twins = shortened(model, blocks)
    try:
        return extended(discover(short, call), blocks, twins)
    except ValueError:
        if len(set(twins.values())) == len(blocks):
            raise
    # It counts its blocks, so that none may be missing.
    return extended(discover(model, call), blocks, dict(zip(blocks, blocks)))


def _in_float32_on_the_cpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.cpu().float() if value.is_floating_point() else value.cpu()


@torch.no_grad()
def order_of_calls(model: nn.Module, call: Call) -> list[str]:
    """Name the modules that a call runs, in the order in which it enters them."""
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: order.setdefault(name)

    handles = [module.register_forward_pre_hook(note(name))
               for name, module in model.named_modules()]
    try:
        model(**call)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def without_idle(found: Discovery, running: set[str]) -> Discovery:
    """Leave out sites with a linear that is not called as a module: it cannot be replaced."""
    sites = tuple(site for site in found.sites if running.issuperset(site.linears))
    return replace(found, sites=sites)


def extended(found: Discovery, blocks: list[str], twins: dict[str, str]) -> Discovery:
    """Describe a whole model by what was found in its shortened copy.

    Sites, folds, reasons and attentions of a copied block are renamed for every block like it.
    What stands before and behind the blocks is taken as it is.

    Args:
        found: in the shortened copy.
        blocks: names of all blocks of the whole model, in forward order.
        twins: for each of them the name, in the copy, of the block that stands for it.
    """
    before, inside, behind = _parts(found.sites)
    sites, reasons = list(before), {}
    for block in blocks:
        for site in inside:
            if site.block == twins[block]:
                same = moved(site, block)
                sites.append(same)
                if site.name in found.reasons:
                    reasons[same.name] = found.reasons[site.name]
    attentions = tuple(
        AttentionSite(renamed(attention.name, twin, block), renamed(attention.output, twin, block))
        for block, twin in twins.items() for attention in found.attentions
        if attention.name.startswith(f"{twin}."))
    return Discovery(tuple(blocks), (*sites, *behind), reasons, attentions)


def _parts(sites: Sequence[Site]) -> tuple[list[Site], list[Site], list[Site]]:
    """Part sites into those before the last block, those of blocks, and those behind."""
    last = max(number for number, site in enumerate(sites) if site.block is not None)
    before = [site for site in sites[:last] if site.block is None]
    inside = [site for site in sites if site.block is not None]
    return before, inside, list(sites[last + 1:])


def unvisited(model: nn.Module) -> ExploredArchitecture:
    """Say what can be known of a model without a call: its linears, and no fold.

    Of a transformer of diffusers that ``inspection`` knows, what its linears read is known, too.

    Raises:
        ValueError: it has no repeated blocks.
    """
    blocks = tuple(find_blocks(model))
    sites = tuple(plain_sites(model, blocks))
    if hasattr(model, "register_to_config"):
        sites = inspect({**model.config, "_class_name": type(model).__name__}).sites
    return ExploredArchitecture(Discovery(blocks, sites, {}), (), "")
