"""A model without most of its blocks, to look into: what holds for a block holds for its likes."""
import copy
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from torch import nn

from architectures.discover import Discovery
from architectures.sites import AttentionSite, Entries, Fold, Modulation, Rows, Site

# Blocks of every kind that a shortened model keeps: the first and the last.
KEPT = 2


def kind_of(block: nn.Module) -> Hashable:
    """Tell blocks apart: two of one kind have the same class and the same linears."""
    shapes = [(name, tuple(module.weight.shape)) for name, module in block.named_modules()
              if isinstance(module, nn.Linear)]
    return type(block), tuple(shapes)


def shortened(model: nn.Module, blocks: Iterable[str]) -> tuple[nn.Module, dict[str, str]]:
    """Copy a model with the first and the last block of every kind; tensors are shared.

    Args:
        blocks: the names of all blocks, list by list.

    Returns:
        The copy, and for each block of the model the name of its like in the copy.
    """
    lists: dict[str, list[str]] = {}
    for name in blocks:
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    short, twins = shallow_copy(model), {}
    for place, names in lists.items():
        kinds = {name: kind_of(model.get_submodule(name)) for name in names}
        kept = _ends_of_kinds(kinds)
        every = [f"{place}.{number}" for number in range(len(model.get_submodule(place)))]
        # Entries of a list that are no blocks stay.
        entries = [name for name in every if name in kept or name not in kinds]
        place_in_copy = {name: f"{place}.{entries.index(name)}" for name in kept}
        _replace(short, place, nn.ModuleList(model.get_submodule(name) for name in entries))
        first_of = {kind: name for name, kind in reversed(kinds.items())}
        for name, kind in kinds.items():
            twins[name] = place_in_copy[name if name in kept else first_of[kind]]
    return short, twins


def _ends_of_kinds(kinds: dict[str, Hashable]) -> set[str]:
    """Pick the first and the last block of every kind."""
    kept, left = set(), Counter(kinds.values())
    seen: Counter[Hashable] = Counter()
    for name, kind in kinds.items():
        seen[kind] += 1
        if seen[kind] < KEPT or seen[kind] == left[kind]:
            kept.add(name)
    return kept


def shallow_copy(module: nn.Module) -> nn.Module:
    """Copy a module with the same parameters and the same submodules, which can be replaced."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    # What wraps it, as accelerate's hooks do, would call the original.
    twin.__dict__.pop("forward", None)
    return twin


def _replace(model: nn.Module, place: str, entries: nn.ModuleList) -> None:
    """Replace a submodule; modules on the way to it become copies, others stay shared."""
    name, _, rest = place.partition(".")
    if not rest:
        model._modules[name] = entries
        return
    model._modules[name] = shallow_copy(model._modules[name])
    _replace(model._modules[name], rest, entries)


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


def moved(site: Site, block: str) -> Site:
    """Describe the same site of another block."""
    linears = tuple(renamed(name, site.block, block) for name in site.linears)
    folds = tuple(_moved_fold(fold, site.block, block) for fold in site.folds)
    name = renamed(site.name, site.block, block)
    return replace(site, name=name, linears=linears, block=block, folds=folds)


def _moved_fold(fold: Fold, old: str, new: str) -> Fold:
    if isinstance(fold, Rows | Modulation):
        return replace(fold, linear=renamed(fold.linear, old, new))
    if isinstance(fold, Entries):
        return replace(fold, parameter=renamed(fold.parameter, old, new))
    table = None if fold.table is None else renamed(fold.table, old, new)
    return replace(fold, table=table, block=new)


def renamed(name: str, old: str, new: str) -> str:
    """Put a name of one block into another; a name outside stays."""
    inside = name.startswith(f"{old}.")
    return f"{new}.{name.removeprefix(f'{old}.')}" if inside else name
