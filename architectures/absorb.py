"""Walk back from an activation to the places that can divide it.

A walk carries a ``Demand``: which factor has to divide which element. Every operation either hands
it on to its inputs, ends it at a place that absorbs it, or stops it. A product can be divided in
either of its factors, so a walk may end in several ways. Nothing is proved here: ``proving`` tries
what a walk proposes.
"""
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from architectures.channels import UNTOUCHED, Demand, Obstacle, before, before_broadcast
from architectures.tracing import ARGUMENT, Trace

PROPOSALS = 4  # that a walk keeps of the ways of a product or a sum
STEPS = 400  # that a walk may take

_SAME = {"to", "_to_copy", "dropout", "dropout_", "type_as", "contiguous", "clone", "detach",
         "alias", "lift_fresh_copy", "relu", "leaky_relu"}
# A positive factor passes them, a sum does not.
_POSITIVE = {"relu", "leaky_relu"}
_MOVES = {"view", "reshape", "_unsafe_view", "permute", "transpose", "t", "expand", "expand_as",
          "slice", "select", "unsqueeze", "squeeze", "flatten", "unflatten", "narrow", "movedim",
          "swapaxes", "repeat", "repeat_interleave", "roll", "flip", "index_select", "index",
          "tile", "view_as", "pixel_shuffle", "mT", "constant_pad_nd", "pad", "swapdims",
          "numpy_T", "broadcast_to"}
_PARTS = {"chunk", "split", "unbind", "split_with_sizes", "tensor_split"}
_MATRICES = {"matmul", "bmm", "mm"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}


@dataclass(frozen=True)
class Edit:
    """A tensor that changes: a parameter, a block's argument, or the rows of a weight.

    Attributes:
        node: of the parameter, or of the marker.
        demand: on it; of a weight whose ``rows`` change, on what it computes: (O,).
        rows: whether it is such a weight.
    """

    node: fx.Node
    demand: Demand
    rows: bool = False


Edits = tuple[Edit, ...]
# Moves the elements of a tensor.
Move = Callable[[Tensor], Tensor]


def name_of(node: fx.Node) -> str:
    """Name the operation of a node."""
    target = node.target
    return getattr(getattr(target, "overloadpacket", target), "__name__", str(target))


def behind_casts(node: Any) -> Any:
    """Go back through operations that leave every element where it is."""
    while isinstance(node, fx.Node) and name_of(node) in _SAME - _POSITIVE:
        node = node.args[0]
    return node


def is_rearranged(node: fx.Node) -> bool:
    """Tell whether a node's operation only moves or casts the elements of its first argument."""
    return name_of(node) in _MOVES | _SAME - _POSITIVE | {"getitem"} | _PARTS


def next_linears(node: fx.Node) -> list[fx.Node]:
    """List the linears that a node's output reaches without passing another one."""
    seen, waiting, reached = {node}, list(node.users), []
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        if name_of(user) == "linear":
            reached.append(user)
        else:
            waiting.extend(user.users)
    return reached


def combined(edits: Edits) -> Edits | None:
    """Make one edit of those of every node; None: an element would need two factors."""
    by_node: dict[fx.Node, Edit] = {}
    for edit in edits:
        known = by_node.get(edit.node)
        if known is not None:
            demand = _union(known.demand, edit.demand)
            if demand is None:
                return None
            edit = replace(edit, demand=demand)
        by_node[edit.node] = edit
    return tuple(by_node.values())


def _union(one: Demand, other: Demand) -> Demand | None:
    touched, also = one.factor != UNTOUCHED, other.factor != UNTOUCHED
    both = touched & also
    same = (one.factor == other.factor) & (one.plus == other.plus)
    if (both & ~same).any():
        return None
    return Demand(torch.where(touched, one.factor, other.factor),
                  torch.where(touched, one.plus, other.plus))


class Walk:
    """Walks back from one activation.

    Attributes:
        obstacles: what stopped a way, in words, in the order it was met.
    """

    def __init__(self, trace: Trace, is_vector: Callable[[fx.Node], bool]):
        """Prepare a walk.

        Args:
            is_vector: tells of a marker whether a vector per image passes it.
        """
        self._trace = trace
        self._is_vector = is_vector
        self._steps = 0
        self.obstacles: list[str] = []

    def proposals(self, node: fx.Node, demand: Demand) -> list[Edits]:
        """List the ways to give a node what is demanded of it; none: it cannot be."""
        try:
            return list(itertools.islice(self._ways(node, demand), PROPOSALS))
        except Obstacle as obstacle:
            self.obstacles.append(str(obstacle))
            return []

    def all_of(self, demands: list[tuple[fx.Node, Demand]]) -> Iterator[Edits]:
        """List the ways to meet several demands at once."""
        choices = [self.proposals(node, demand) for node, demand in demands]
        for combination in itertools.product(*choices):
            yield tuple(itertools.chain.from_iterable(combination))

    def step(self, node: fx.Node, demand: Demand) -> tuple[fx.Node, Demand] | None:
        """Go back through one operation that only moves or casts; None: it is no such."""
        if not is_rearranged(node) or not isinstance(node.args[0], fx.Node):
            return None
        try:
            return self._source(node, demand)
        except Obstacle:
            return None

    def _source(self, node: fx.Node, demand: Demand) -> tuple[fx.Node, Demand]:
        """Return what a moving operation moves, and the demand on it."""
        name, source, mover = name_of(node), node.args[0], self._mover(node)
        if name in _SAME:
            return source, demand
        if name == "getitem":
            parts, number = node.args
            if name_of(parts) not in _PARTS:
                raise Obstacle(name_of(parts))
            source, split = parts.args[0], self._mover(parts)
            mover = _picked(split, number)
        return source, before(demand, mover, self._shape(source), f"{name} mixes channels")

    def _ways(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        self._steps += 1
        if self._steps > STEPS:
            raise Obstacle("reads too much")
        if node.op == "placeholder":
            return iter([(Edit(node, demand),)])
        if node.op == "get_attr":
            raise Obstacle("made outside the block")
        if node.target is ARGUMENT:
            return self._entrance(node, demand)
        name = name_of(node)
        rule = _RULES.get(name)
        if rule is None:
            raise Obstacle(name)
        return rule(self, node, demand)

    def _entrance(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        if not self._is_vector(node):
            raise Obstacle(f"{node.args[2]} enters the block")
        return iter([(Edit(node, demand),)])

    def _same(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Pass the demand through a cast or a copy, and without a plus through a ReLU."""
        if name_of(node) in _POSITIVE:
            _refuse_plus(node, demand)
        return self._ways(node.args[0], demand)

    def _move(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Pass the demand to where each element came from."""
        return self._ways(*self._source(node, demand))

    def _join(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert ``cat``: each piece takes over its stretch of the demand along ``dim``."""
        pieces, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        start, demands = 0, []
        for piece in pieces:
            size = self._shape(piece)[dim]
            demands.append((piece, demand.narrow(dim, start, size)))
            start += size
        return self._touched(demands)

    def _stack(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert ``stack``: each piece takes over its index of the demand along ``dim``."""
        pieces, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        return self._touched([(piece, demand.select(dim, number))
                              for number, piece in enumerate(pieces)])

    def _touched(self, demands: list[tuple[fx.Node, Demand]]) -> Iterator[Edits]:
        """Meet those demands that ask for anything."""
        return self.all_of([(node, demand) for node, demand in demands
                            if (demand.factor != UNTOUCHED).any()])

    def _add(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert a sum: ``(a + b + plus) / s - plus = ((a + plus) / s - plus) + b / s``."""
        one, other = node.args
        if "alpha" in node.kwargs:
            raise Obstacle("a weighted sum")
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            tensor, number = (one, other) if isinstance(one, fx.Node) else (other, one)
            return self._ways(tensor, demand.add_to_plus(number))
        # Only one of them has to take up the ones that are missing: a parameter, if there is one.
        plain = demand.without_plus()
        orders = [(one, other), (other, one)] if demand.has_plus else [(one, other)]
        orders.sort(key=lambda order: not self._is_parameter(order[0]))
        ways = (self.all_of([(first, self._broadcast(first, demand)),
                             (second, self._broadcast(second, plain))])
                for first, second in orders)
        return itertools.chain.from_iterable(ways)

    def _subtract(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert ``a - b``, as a sum of ``a`` and ``-b``."""
        one, other = node.args
        if not isinstance(one, fx.Node) or "alpha" in node.kwargs:
            raise Obstacle("a weighted sum")
        if not isinstance(other, fx.Node):
            return self._ways(one, demand.add_to_plus(-other))
        return self.all_of([(one, self._broadcast(one, demand)),
                            (other, self._broadcast(other, demand.without_plus()))])

    def _multiply(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert a product: ``a b / s = (a / s) b = a (b / s)``, two ways; a number moves plus."""
        one, other = node.args
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            tensor, number = (one, other) if isinstance(one, fx.Node) else (other, one)
            if number == 0:
                raise Obstacle("a product with 0")
            return self._ways(tensor, demand.scale_plus(1 / number))
        _refuse_plus(node, demand)
        if one is other:
            raise Obstacle("a square")
        smaller_first = sorted([one, other], key=lambda operand: self._shape(operand).numel())
        ways = (self._attempt(operand, demand) for operand in smaller_first)
        return itertools.chain.from_iterable(ways)

    def _attempt(self, operand: fx.Node, demand: Demand) -> list[Edits]:
        try:
            return self.proposals(operand, self._broadcast(operand, demand))
        except Obstacle as obstacle:
            self.obstacles.append(str(obstacle))
            return []

    def _divide(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert ``a / b``: ``a`` is divided; a number ``b`` moves plus."""
        one, other = node.args
        if isinstance(other, fx.Node):
            _refuse_plus(node, demand)
            return self._ways(one, self._broadcast(one, demand))
        return self._ways(one, demand.scale_plus(other))

    def _where(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert a choice between two tensors: both take over the whole demand."""
        branches = [branch for branch in node.args[1:] if isinstance(branch, fx.Node)]
        return self.all_of([(branch, self._broadcast(branch, demand)) for branch in branches])

    def _linear(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        return self._rows(node, demand, channel=-1)

    def _convolution(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        return self._rows(node, demand, channel=1)

    def _rows(self, node: fx.Node, demand: Demand, channel: int) -> Iterator[Edits]:
        """End at a weight W (O, I): one factor and plus per output channel, W's rows."""
        weight = behind_casts(node.args[1])
        if weight not in self._trace.names:
            raise Obstacle("a computed weight")
        demand = demand.moved(lambda tensor: tensor.movedim(channel, -1))
        channels = demand.factor.shape[-1:]
        rows = before_broadcast(demand, channels, "channels of several factors")
        return iter([(Edit(weight, rows, rows=True),)])

    def _norm(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert ``n(x) w + b``: w is divided, and b becomes ``(b + plus) / s - plus``."""
        affine = [values for values in node.args[2:4] if isinstance(values, fx.Node)]
        if not affine:
            raise Obstacle("a norm without weights")
        if demand.has_plus and len(affine) < 2:
            raise Obstacle("a norm without bias")
        shape = self._shape(affine[0])
        on_bias = before_broadcast(demand, shape, "channels of several factors")
        demands = [on_bias.without_plus(), on_bias]
        # They may be computed of parameters: ``weight + 1``.
        return self.all_of(list(zip(affine, demands)))

    def _attention(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert ``P V``, which averages over tokens: V is divided alike in all of them."""
        _refuse_plus(node, demand)
        value = node.args[2]
        *batch, heads, tokens, _ = self._shape(value)
        *_, width = demand.factor.shape
        query_heads = demand.factor.shape[-3]
        averaged = (*batch, query_heads, 1, width)
        demand = before_broadcast(demand, averaged, "tokens of several factors")
        if heads != query_heads:
            share = query_heads // heads
            demand = before(
                demand, lambda numbers: numbers.repeat_interleave(share, dim=-3),
                torch.Size((*batch, heads, 1, width)), "query heads share values")
        shape = (*batch, heads, tokens, width)
        return self._ways(value, demand.moved(lambda tensor: tensor.expand(shape)))

    def _matrices(self, node: fx.Node, demand: Demand) -> Iterator[Edits]:
        """Invert ``A B``: factors of columns divide those of B, factors of rows those of A."""
        _refuse_plus(node, demand)
        one, other = node.args[:2]
        ways = (self._operand(operand, demand, summed)
                for operand, summed in ((other, -2), (one, -1)))
        return itertools.chain.from_iterable(ways)

    def _operand(self, operand: fx.Node, demand: Demand, summed: int) -> list[Edits]:
        """Divide one matrix of a product, whose dimension ``summed`` the product sums over."""
        shape = self._shape(operand)
        kept = list(demand.factor.shape)
        kept[summed] = 1
        try:
            demand = before_broadcast(demand, tuple(kept), "channels of several factors")
            kept[summed] = shape[summed]
            demand = demand.moved(lambda tensor: tensor.expand(kept))
            return self.proposals(operand, before_broadcast(demand, shape, "heads share values"))
        except Obstacle as obstacle:
            self.obstacles.append(str(obstacle))
            return []

    def _shape(self, node: fx.Node) -> torch.Size:
        return self._trace.values[node].shape

    def _broadcast(self, operand: fx.Node, demand: Demand) -> Demand:
        return before_broadcast(demand, self._shape(operand), "channels of several factors")

    def _is_parameter(self, node: fx.Node) -> bool:
        while isinstance(node, fx.Node) and name_of(node) in _MOVES | _SAME:
            node = node.args[0]
        return node in self._trace.names

    def _mover(self, node: fx.Node) -> Move:
        """Return what a node does to its first argument."""
        values = self._trace.values
        args = fx.map_arg(node.args[1:], lambda operand: values[operand])
        kwargs = fx.map_arg(node.kwargs, lambda operand: values[operand])
        if name_of(node) in ("constant_pad_nd", "pad"):
            return lambda numbers: torch.constant_pad_nd(numbers, args[0], UNTOUCHED)
        return lambda numbers: node.target(numbers, *args, **kwargs)


def _picked(split: Move, number: int) -> Move:
    """Return what gives one of the parts that ``split`` cuts a tensor into."""
    return lambda numbers: split(numbers)[number]


def _refuse_plus(node: fx.Node, demand: Demand) -> None:
    if demand.has_plus:
        raise Obstacle(f"{name_of(node)} under a sum with 1")


_RULES: dict[str, Callable[[Walk, fx.Node, Demand], Iterator[Edits]]] = {
    **dict.fromkeys(_SAME, Walk._same),
    **dict.fromkeys(_MOVES, Walk._move),
    **dict.fromkeys(_MATRICES, Walk._matrices),
    **dict.fromkeys(_CONVOLUTIONS, Walk._convolution),
    **dict.fromkeys(("add", "add_", "__add__"), Walk._add),
    **dict.fromkeys(("mul", "mul_"), Walk._multiply),
    **dict.fromkeys(("div", "div_"), Walk._divide),
    "sub": Walk._subtract,
    "getitem": Walk._move,
    "cat": Walk._join,
    "stack": Walk._stack,
    "where": Walk._where,
    "linear": Walk._linear,
    "layer_norm": Walk._norm,
    "rms_norm": Walk._norm,
    "scaled_dot_product_attention": Walk._attention,
}
