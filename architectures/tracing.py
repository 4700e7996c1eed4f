"""One call of a transformer as a graph of tensor operations, with its blocks' doors marked.

Parameters are inputs of the graph, drawn at random: published models start with zeros where a
wrong fold would go unseen. Every tensor that enters a block passes a marker that names block and
argument, so that a walk through the graph knows where a block ends.
"""
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from architectures.sites import Call, call_of

SPREAD = 0.2  # of random biases and norms


@torch.library.custom_op("ditas::argument", mutates_args=())
def argument(value: Tensor, block: str, name: str) -> Tensor:
    """Pass a tensor into a block as one of its arguments."""
    return value.clone()


ARGUMENT = torch.ops.ditas.argument.default


@dataclass(frozen=True)
class Trace:
    """A recorded call.

    Attributes:
        graph: of the call; takes the parameters in order.
        parameters: what they were, by state-dict name.
        names: of the parameters, by the node that holds them.
        values: what every node computed.
        images: of the call.
        attentions: the modules that called ``scaled_dot_product_attention``, call by call.
    """

    graph: fx.GraphModule
    parameters: dict[str, Tensor]
    names: dict[fx.Node, str]
    values: dict[fx.Node, Any]
    images: int
    attentions: tuple[str, ...]


@torch.no_grad()
def trace(model: nn.Module, call: Call, blocks: list[str], seed: int = 0) -> Trace:
    """Record a call of a model with random parameters; the model stays as it is.

    Args:
        model: in eval mode, of few blocks, on any device.
        call: arguments of its ``forward``, in float32 on the CPU, where all is computed.
        blocks: names of the modules whose arguments are marked.

    Raises:
        ValueError: the call fails, cannot be recorded, or the record computes something else.
    """
    parameters = random_parameters(model, seed)
    buffers = {name: _on_the_cpu(buffer) for name, buffer in model.named_buffers()}

    def compute(parameters: dict[str, Tensor]) -> list[Tensor]:
        return tensors_of(functional_call(model, {**parameters, **buffers}, (), call))

    with marked(model, blocks):
        try:
            with noted_attentions(model) as attentions:
                expected = compute(parameters)
            graph = make_fx(compute, pre_dispatch=True, tracing_mode="real")(parameters)
        except Exception as error:  # whatever a model's own code raises
            raise ValueError(f"the call cannot be traced: {type(error).__name__}: "
                             f"{_first_line(error)}") from error
    recorder = _Recorder(graph)
    outputs = recorder.run(*parameters.values())
    if not agree(outputs, expected, tolerance=1e-6):
        raise ValueError("the call cannot be traced: the graph computes something else")
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    names = dict(zip(placeholders, parameters))
    return Trace(graph, parameters, names, recorder.values, images_of(call), tuple(attentions))


def _on_the_cpu(buffer: Tensor) -> Tensor:
    return buffer.float().cpu() if buffer.is_floating_point() else buffer.cpu()


def random_parameters(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Draw parameters under which activations keep their size, by state-dict name."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim > 1:
            # As wide as a neuron's inputs are many.
            parameters[name] = noise / parameter[0].numel() ** 0.5
        else:
            norm = name.endswith("weight")
            parameters[name] = SPREAD * noise + (1 if norm else 0)
    return parameters


def images_of(call: Call) -> int:
    """Count the images of a call: as many as its timesteps, the shortest list of numbers.

    Without such a list, it is as many as its first argument with several entries has.
    """
    tensors = [value for value in pytree.tree_leaves(call) if isinstance(value, Tensor)]
    vectors = [len(value) for value in tensors if value.ndim == 1]
    if vectors:
        return min(vectors)
    entries = [value for value in call.values() if isinstance(value, list | Tensor)]
    return len(entries[0])


def tensors_of(output: Any) -> list[Tensor]:
    """List the tensors of whatever a model returns."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]


def agree(outputs: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Tell whether tensors are equal up to an error relative to their size."""
    return distance(outputs, expected) <= tolerance


def distance(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest ``|output - expected| / |expected|``; infinite where one is not finite."""
    largest = 0.0
    for output, wanted in zip(outputs, expected, strict=True):
        error = (output.double() - wanted.double()).norm() / wanted.double().norm()
        largest = max(largest, float(torch.nan_to_num(error, nan=float("inf"))))
    return largest


@contextlib.contextmanager
def marked(model: nn.Module, blocks: list[str]) -> Iterator[None]:
    """Let every tensor that enters a block pass a marker."""
    handles = []
    for name in blocks:
        hook = partial(_mark, name)
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Noted(TorchFunctionMode):
    """Notes which module runs whenever attention multiplies."""

    def __init__(self, running: list[str], noted: list[str]):
        super().__init__()
        self._running, self._noted = running, noted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            self._noted.append(self._running[-1])
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def noted_attentions(model: nn.Module) -> Iterator[list[str]]:
    """List the modules that call ``scaled_dot_product_attention`` while open, call by call."""
    running, noted, handles = [], [], []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(_enter, running, name)))
        handles.append(module.register_forward_hook(partial(_leave, running), always_call=True))
    try:
        with _Noted(running, noted):
            yield noted
    finally:
        for handle in handles:
            handle.remove()


def _enter(running: list[str], name: str, module: nn.Module, args: tuple) -> None:
    running.append(name)


def _leave(running: list[str], module: nn.Module, args: tuple, output: Any) -> None:
    running.pop()


def _mark(block: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    call = call_of(module, args, kwargs)
    names = list(call)

    def mark(name: str, value: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda tensor: argument(tensor, block, name), value)

    args = tuple(mark(name, value) for name, value in zip(names, args))
    return args, {name: mark(name, value) for name, value in kwargs.items()}


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node computes."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        self.values[node] = super().run_node(node)
        return self.values[node]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else ""
