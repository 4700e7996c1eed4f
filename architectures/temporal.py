"""What timestep and pooled condition decide in any model, and how it runs without the tokens.

Tokens become PyTorch's fake tensors, which have shape and type and no values. What is computed of
them is fake, too, and takes no time; whatever else a call computes is computed as ever, gradients
included. No graph is needed, so that a call may have any number of images.
"""
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from architectures.hooked import hooked
from architectures.sites import Call
from architectures.tracing import images_of, tensors_of

# Tokens have images, their numbers and channels, or more.
TOKEN_DIMENSIONS = 3


class _Done(Exception):
    """All linears ran; what follows need not be computed."""


@dataclass(frozen=True)
class Temporal:
    """Linears that timestep and condition alone decide, in the order in which they run.

    Attributes:
        linears: all of them.
        outputs: those whose outputs others read than these linears.
    """

    linears: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def run(self, model: nn.Module, call: Call) -> tuple[Tensor, ...]:
        """Compute ``outputs``, (N, ...) each, given a call of the model for N images.

        Of a linear that runs several times it is the first output.
        """
        outputs: dict[str, Tensor] = {}

        def keep(name: str, _: Tensor, output: Tensor) -> None:
            outputs.setdefault(name, output)
            if len(outputs) == len(self.linears):
                raise _Done

        with hooked(model, self.linears, keep):
            with suppress(_Done):
                model(**without_tokens(call))
        return tuple(outputs[name] for name in self.outputs)


def find_temporal(model: nn.Module, call: Call, candidates: list[str]) -> Temporal:
    """Find out which linears run without the tokens; a model whose code looks at these has none.

    Args:
        model: in eval mode.
        call: arguments of its ``forward``.
        candidates: names of linears.
    """
    try:
        linears = _alone(model, call, candidates)
        return Temporal(linears, _read_by_others(model, call, linears))
    except Exception:  # whatever a model's own code raises
        return Temporal()


@torch.no_grad()
def _alone(model: nn.Module, call: Call, candidates: list[str]) -> tuple[str, ...]:
    """Name the linears that without the tokens give an output for every image."""
    images = images_of(call)
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, _: Tensor, output: Tensor) -> None:
        outputs.setdefault(name, []).append(output)

    with hooked(model, candidates, keep):
        model(**without_tokens(call))
    return tuple(name for name, values in outputs.items()
                 if all(len(value) == images and not isinstance(value, FakeTensor)
                        for value in values))


@torch.enable_grad()
def _read_by_others(model: nn.Module, call: Call, linears: tuple[str, ...]) -> tuple[str, ...]:
    """Name the linears whose outputs reach what a model returns through no other of them."""
    starts: list[tuple[str, Tensor]] = []

    def start_anew(name: str, _: Tensor, output: Tensor) -> Tensor:
        # What led to this output is another linear's.
        start = output.detach().requires_grad_()
        starts.append((name, start))
        return start.clone()

    with hooked(model, linears, start_anew):
        reached = _leaves(tensors_of(model(**without_tokens(call))))
    return tuple(dict.fromkeys(name for name, start in starts if id(start) in reached))


def _leaves(outputs: list[Tensor]) -> set[int]:
    """Find the tensors that were computed of nothing, by their ``id``."""
    leaves, known = set(), set()
    nodes = [output.grad_fn for output in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        nodes += [before for before, _ in node.next_functions]
    return leaves


def without_tokens(call: Call) -> Call:
    """Take the values of tokens out of a call: of floating tensors with many dimensions.

    Tensors in lists, an image each, count as tokens, too.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return {name: _hidden(value, mode, TOKEN_DIMENSIONS) for name, value in call.items()}


def _hidden(value: Any, mode: FakeTensorMode, least: int) -> Any:
    if isinstance(value, dict):
        return {name: _hidden(item, mode, least) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_hidden(item, mode, 1) for item in value)
    is_tokens = (isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= least)
    return mode.from_tensor(value) if is_tokens else value
