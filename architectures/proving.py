"""Try on a recorded call whether edits of its tensors leave its outputs as they are."""
from typing import Any

import torch
from torch import Tensor, fx

from architectures.absorb import Edits, behind_casts, name_of
from architectures.channels import Demand, apply
from architectures.tracing import Trace, distance

# A right fold moves outputs by the rounding of float32, some 1e-6.
TOLERANCE = 1e-5
# Multiplied columns alone have to move outputs by this much, else nothing would be proved.
LEAST_EFFECT = 1e-3


def draw_factors(width: int, seed: int) -> Tensor:
    """Draw factors (width,) between 0.5 and 2."""
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * 4 ** torch.rand(width, generator=generator)


class Prover:
    """Runs a recorded call with edited tensors."""

    def __init__(self, trace: Trace):
        self._trace = trace
        self._expected = _outputs(trace)
        self._readers = _readers_of_weights(trace)

    @torch.no_grad()
    def proves(self, linears: list[fx.Node], edits: Edits, width: int) -> bool:
        """Tell whether edits undo that the columns of weights were multiplied by factors.

        Args:
            linears: weights whose columns (width) are multiplied.
        """
        return self._error(linears, edits, width) <= TOLERANCE

    @torch.no_grad()
    def has_effect(self, linears: list[fx.Node], width: int) -> bool:
        """Tell whether multiplied columns move the outputs at all."""
        return self._error(linears, (), width) > LEAST_EFFECT

    def _error(self, linears: list[fx.Node], edits: Edits, width: int) -> float:
        """Compute how far outputs move when columns are multiplied and tensors edited."""
        factors = draw_factors(width, seed=1)
        parameters = dict(self._trace.parameters)
        for node in linears:
            name = self._trace.names[node]
            parameters[name] = parameters[name] * factors
        changed: dict[fx.Node, list[Demand]] = {}
        for edit in edits:
            nodes = self._readers[edit.node] if edit.rows else [edit.node]
            for node in nodes:
                changed.setdefault(node, []).append(edit.demand)
        editor = _Editor(self._trace.graph, changed, factors)
        return distance(editor.run(*parameters.values()), self._expected)


class _Editor(fx.Interpreter):
    """Runs a graph and gives what some nodes compute what is demanded of it."""

    def __init__(
        self, graph: fx.GraphModule, changed: dict[fx.Node, list[Demand]], factors: Tensor
    ):
        super().__init__(graph)
        self._changed, self._factors = changed, factors

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        for demand in self._changed.get(node, ()):
            value = apply(_beside(node, demand), value, self._factors)
        return value


def _beside(node: fx.Node, demand: Demand) -> Demand:
    """Bring a demand on rows to the shape of what a convolution computes."""
    if name_of(node).startswith("conv"):
        dims = int(name_of(node)[4])
        return demand.moved(lambda rows: rows.reshape(-1, *(1,) * dims))
    return demand


def _outputs(trace: Trace) -> list[Tensor]:
    node = next(node for node in trace.graph.graph.nodes if node.op == "output")
    return trace.values[node]


def _readers_of_weights(trace: Trace) -> dict[fx.Node, list[fx.Node]]:
    """List the linears and convolutions that multiply by every weight."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in trace.graph.graph.nodes:
        if name_of(node) == "linear" or name_of(node).startswith("conv"):
            readers.setdefault(behind_casts(node.args[1]), []).append(node)
    return readers
