"""Blocks, sites and folds of any transformer with repeated blocks, found in one recorded call.

No model is named here. Blocks are the repeated entries of the model's lists; linears that read one
activation are a site; where a factor folds is proposed by a walk and proved by running the call.
"""
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx, nn

from architectures.absorb import (
    Edits,
    Walk,
    behind_casts,
    combined,
    is_rearranged,
    name_of,
    next_linears,
)
from architectures.attentions import find_attentions
from architectures.channels import Obstacle, is_last_channels, last_channels
from architectures.folds import folds_of
from architectures.proving import Prover
from architectures.sites import AttentionSite, Call, Fold, Site
from architectures.tracing import ARGUMENT, Trace, trace

LEAST_LINEARS = 2  # of a block
SHARED = "shared with others"  # why a walk's proposals failed

# Edits that fold, or None and why there are none.
Answer = tuple[Edits | None, str]


@dataclass(frozen=True)
class Discovery:
    """What was found in a model.

    Attributes:
        blocks: their names, list by list.
        sites: of all linears that the call ran, in forward order. Their role is ``block``,
            ``modulation``, ``vector`` (it reads a vector per image that no block's norm uses),
            ``patches`` or ``outside``.
        reasons: why a site of a block divides its input itself, by its name.
        attentions: of the blocks, whose operands can be quantised.
    """

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    reasons: dict[str, str]
    attentions: tuple[AttentionSite, ...] = ()

    def scope(self, name: str) -> list[Site]:
        """List the sites that a scope quantises, one of ``config.SCOPES``."""
        if name == "all":
            return list(self.sites)
        if name == "inner":
            # All but the first and the last that run.
            return list(self.sites[1:-1])
        roles = ("block",) if name == "blocks" else ("block", "modulation")
        return [site for site in self.sites if site.role in roles]


@dataclass(frozen=True)
class Group:
    """Linears that share a factor.

    Attributes:
        weights: their weights' nodes, in forward order.
        activations: the nodes of what they read; several where a linear is called twice.
    """

    block: str | None
    weights: tuple[fx.Node, ...]
    activations: tuple[fx.Node, ...]


def find_blocks(model: nn.Module) -> list[str]:
    """Name the repeated entries of a model's outermost lists of blocks.

    Raises:
        ValueError: there are none.
    """
    blocks = list(_repeated(model, ""))
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no repeated blocks: expected a ModuleList "
                         "with two entries of one class or more, each with linears")
    return blocks


def _repeated(module: nn.Module, place: str) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{place}{name}"
        if isinstance(child, nn.ModuleList):
            kinds = Counter(type(entry) for entry in child)
            entries = [f"{path}.{number}" for number, entry in enumerate(child)
                       if kinds[type(entry)] > 1 and _linears(entry) >= LEAST_LINEARS]
            if entries:
                yield from entries
                continue
        yield from _repeated(child, f"{path}.")


def _linears(module: nn.Module) -> int:
    return sum(isinstance(child, nn.Linear) for child in module.modules())


def discover(model: nn.Module, call: Call, seed: int = 0) -> Discovery:
    """Find blocks, sites and folds of a model; it stays as it is.

    Args:
        model: in eval mode, of at least two blocks of every kind, small: its call runs some
            hundred times, with random parameters.
        call: arguments of its ``forward``, for at least two images.

    Raises:
        ValueError: it has no repeated blocks, or the call cannot be traced.
    """
    blocks = find_blocks(model)
    weights = {f"{name}.weight" for name, module in model.named_modules()
               if isinstance(module, nn.Linear)}
    recorded = trace(model, call, blocks, seed)
    found = _Explorer(recorded, tuple(blocks), weights).discovery()
    return replace(found, attentions=find_attentions(recorded, found.sites))


class _Explorer:
    """Reads a recorded call."""

    def __init__(self, trace: Trace, blocks: tuple[str, ...], weights: set[str]):
        self._trace = trace
        self._blocks = blocks
        self._prover = Prover(trace)
        self._linears = [node for node in trace.graph.graph.nodes
                         if name_of(node) == "linear"
                         and trace.names.get(behind_casts(node.args[1])) in weights]
        markers = [node for node in trace.graph.graph.nodes if node.target is ARGUMENT]
        # What linears outside the blocks give to blocks as a vector per image. Sums are left out:
        # most are those of embedders, whose linears modulate nothing themselves.
        terms = [_terms(marker.args[0]) for marker in markers if self._is_vector(marker)]
        self._vectors = {linears[0] for linears in terms if len(linears) == 1}

    def discovery(self) -> Discovery:
        groups = self._groups()
        answers = {group: self._fold(group) for group in groups if self._is_balanced(group)}
        groups, answers = self._merge(groups, answers)
        sites, reasons = [], {}
        for group in groups:
            folds, reason = (), ""
            if group in answers:
                edits, reason = answers[group]
                folds, reason = self._describe(edits, group, reason)
            site = self._site(group, folds)
            sites.append(site)
            if site.is_balanced and not folds:
                reasons[site.name] = reason
        return Discovery(self._blocks, (*self._patches(), *sites), reasons)

    def _patches(self) -> list[Site]:
        """List convolutions outside the blocks whose windows do not overlap."""
        names = self._trace.names
        convolutions = [node for node in self._trace.graph.graph.nodes
                        if name_of(node) == "conv2d" and behind_casts(node.args[1]) in names]
        sites = []
        for node in convolutions:
            weight = behind_casts(node.args[1])
            window, strides = self._trace.values[weight].shape[2:], node.args[3:4]
            if self._block_of(weight) is None and strides and list(strides[0]) == list(window):
                name = names[weight].removesuffix(".weight")
                sites.append(Site(name, (name,), "patches"))
        return sites

    # Groups.

    def _groups(self) -> list[Group]:
        """Group linears of one block that read one activation, or are one and the same."""
        groups: list[Group] = []
        for node in self._linears:
            weight = behind_casts(node.args[1])
            activation = self._source(node.args[0])
            block = self._block_of(weight)
            same = [group for group in groups if group.block == block
                    and (weight in group.weights or activation in group.activations)]
            for group in same:
                groups.remove(group)
            weights = [known for group in same for known in group.weights] + [weight]
            activations = [known for group in same for known in group.activations] + [activation]
            groups.append(Group(block, _unique(weights), _unique(activations)))
        order = {name: number for number, name in enumerate(self._weights_in_order())}
        return sorted(groups, key=lambda group: order[group.weights[0]])

    def _weights_in_order(self) -> tuple[fx.Node, ...]:
        return _unique([behind_casts(node.args[1]) for node in self._linears])

    def _source(self, node: fx.Node) -> fx.Node:
        """Go back from an activation as long as only tokens are moved, cut or cast."""
        values = self._trace.values
        demand = last_channels(values[node].shape)
        while True:
            step = Walk(self._trace, lambda marker: False).step(node, demand)
            if step is None or not is_last_channels(step[1]):
                return node
            node, demand = step

    def _block_of(self, weight: fx.Node) -> str | None:
        name = self._trace.names[weight]
        return next((block for block in self._blocks if name.startswith(f"{block}.")), None)

    def _width(self, group: Group) -> int:
        return self._trace.values[group.weights[0]].shape[-1]

    def _is_per_image(self, node: fx.Node) -> bool:
        value = self._trace.values[node]
        return value.numel() == self._trace.images * value.shape[-1]

    def _is_balanced(self, group: Group) -> bool:
        return group.block is not None and not self._is_group_per_image(group)

    def _is_group_per_image(self, group: Group) -> bool:
        return all(self._is_per_image(node) for node in group.activations)

    # Folds.

    def _fold(self, group: Group) -> Answer:
        """Find edits that divide a group's activations, or say why there are none."""
        walk = Walk(self._trace, self._is_vector)
        demands = [(node, last_channels(self._trace.values[node].shape))
                   for node in group.activations]
        proposals = [combined(edits) for edits in walk.all_of(demands)]
        proposals = [edits for edits in proposals if edits is not None]
        if not proposals:
            return None, walk.obstacles[0] if walk.obstacles else "several factors"
        width = self._width(group)
        if not self._prover.has_effect(list(group.weights), width):
            return None, "without effect on the output"
        for edits in proposals:
            if self._prover.proves(list(group.weights), edits, width):
                return edits, ""
        return None, SHARED

    def _merge(
        self, groups: list[Group], answers: dict[Group, Answer]
    ) -> tuple[list[Group], dict[Group, Answer]]:
        """Let groups of one block share a factor where only all of them together fold."""
        groups, answers = list(groups), dict(answers)
        shared = [group for group in answers if answers[group][1] == SHARED]
        for one, other in itertools.combinations(shared, 2):
            alone = one in answers and other in answers
            if not alone or one.block != other.block or self._width(one) != self._width(other):
                continue
            both = Group(one.block, _unique([*one.weights, *other.weights]),
                         _unique([*one.activations, *other.activations]))
            edits, reason = self._fold(both)
            if edits is not None:
                groups[groups.index(one)] = both
                groups.remove(other)
                del answers[one], answers[other]
                answers[both] = edits, reason
        return groups, answers

    def _is_vector(self, marker: fx.Node) -> bool:
        """Tell whether an argument of a block is a vector per image: a linear's, or their sum."""
        return all(name_of(term) == "linear" and self._is_per_image(term)
                   for term in _terms(marker.args[0]))

    def _describe(
        self, edits: Edits | None, group: Group, reason: str
    ) -> tuple[tuple[Fold, ...], str]:
        if edits is None:
            return (), reason
        try:
            return folds_of(self._trace, edits, self._width(group)), ""
        except Obstacle as obstacle:
            return (), str(obstacle)

    # Sites.

    def _site(self, group: Group, folds: tuple[Fold, ...]) -> Site:
        linears = tuple(self._trace.names[weight].removesuffix(".weight")
                        for weight in group.weights)
        per_image = self._is_group_per_image(group)
        return Site(joined(linears), linears, self._role(group, per_image), group.block, folds,
                    per_image)

    def _role(self, group: Group, per_image: bool) -> str:
        if not per_image:
            return "outside" if group.block is None else "block"
        nodes = [node for node in self._linears if behind_casts(node.args[1]) in group.weights]
        readers = [reader for node in nodes for reader in next_linears(node)]
        embeds = all(self._is_per_image(reader.args[0]) for reader in readers)
        if group.block is not None:
            return "vector" if embeds else "modulation"
        return "modulation" if self._vectors & set(nodes) else "vector"


def joined(linears: tuple[str, ...]) -> str:
    """Name a site after its linears: where they all are, then what each is called there."""
    paths = [name.split(".") for name in linears]
    shared = len(os.path.commonprefix([path[:-1] for path in paths]))
    place = ".".join(paths[0][:shared])
    ends = "+".join(".".join(path[shared:]) for path in paths)
    return f"{place}.{ends}" if place else ends


def _terms(node: fx.Node) -> list[fx.Node]:
    """Find what made a node's values, whatever moved them since; of a sum, what made its terms."""
    while is_rearranged(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if name_of(node) != "add" or not all(isinstance(term, fx.Node) for term in node.args):
        return [node]
    return [part for term in node.args for part in _terms(term)]


def _unique(nodes: list[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(nodes))
