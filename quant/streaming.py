"""A model that lies elsewhere than its inputs: its parts come to the device while they run.

A model may be too large for the accelerator that has to run it. It then stays on the CPU. Each of
its blocks comes to the device of its inputs when it is called, and so does what lies outside the
blocks. Nothing is copied back: the copies on the device are dropped, and what lay on the CPU never
went away. Nobody says that a model is run this way; the device of its inputs does.
"""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Value = TypeVar("Value")

# Where a tensor of a module belongs: the module's own list, the name there, and the tensor.
Place = tuple[dict[str, Tensor | None], str, Tensor]


def accelerator_of(inputs: Any) -> torch.device | None:
    """Find the device of the first tensor that does not lie on the CPU; None: all of them do."""
    tensors = (value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor))
    return next((value.device for value in tensors if value.device.type != "cpu"), None)


def moved(value: Value, device: torch.device) -> Value:
    """Move all tensors that a dataclass holds, and those inside it; other values stay."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not is_dataclass(value):
        return value
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    changed = {name: part for name, part in
               ((name, moved(part, device)) for name, part in parts.items())
               if part is not parts[name]}
    return replace(value, **changed) if changed else value


@contextmanager
def brought(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Have all tensors of a module that lie on the CPU on a device while open; None: stay."""
    places: list[Place] = []
    try:
        _bring(module.modules(), device, places)
        yield
    finally:
        _put_back(places)


@contextmanager
def following(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Let parts of a model come to their inputs whenever they run, while open.

    Copies that are made of the model meanwhile do the same.

    Args:
        blocks: the names of those that come one at a time.
    """
    modules = [model, *map(model.get_submodule, blocks)]
    handles = []
    for module in modules:
        follower = _Follower()
        # What else sees the module called then finds its tensors beside the inputs.
        handles += [
            module.register_forward_pre_hook(follower.come, with_kwargs=True),
            module.register_forward_hook(follower.leave, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Follower:
    """The hooks of a module that comes to its inputs."""

    def __init__(self):
        # One list a call, since a module may be called while it runs.
        self._calls: list[list[Place]] = []

    def come(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # A call that fails on the way has to leave, too.
        self._calls.append([])
        _bring(_own_parts(module), accelerator_of((args, kwargs)), self._calls[-1])

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._calls:
            _put_back(self._calls.pop())


def _own_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and what is inside it, but for parts that come on their own."""
    yield module
    for child in module.children():
        if not _comes_alone(child):
            yield from _own_parts(child)


def _comes_alone(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), _Follower) for hook in hooks)


def _bring(
    modules: Iterator[nn.Module], device: torch.device | None, places: list[Place]
) -> None:
    """Put copies on the device in the places of tensors on the CPU; note these in ``places``."""
    if device is None:
        return
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "cpu":
                    places.append((tensors, name, tensor))
                    # No parameter: gradients pass through it to the one that lies on the CPU.
                    tensors[name] = tensor.to(device)


def _put_back(places: list[Place]) -> None:
    for tensors, name, tensor in places:
        tensors[name] = tensor
