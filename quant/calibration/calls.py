"""Calls of a model: its arguments by name, recorded while it runs and put together again."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from architectures.sites import Call, call_of

# What has an entry for every image.
Entries = Tensor | list


class CallRecorder:
    """Copies the arguments of every call of a module; attribute ``calls`` lists them.

    A tensor that is the same object as in the call before, and unchanged, is kept once.
    """

    def __init__(self):
        self.calls: list[Call] = []
        self._last: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = call_of(module, args, kwargs)
        self.calls.append({name: self._copy(name, value) for name, value in call.items()})

    def _copy(self, path: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(path, value)
        if isinstance(value, dict):
            return {key: self._copy(f"{path}.{key}", item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(f"{path}.{i}", item) for i, item in enumerate(value))
        return value

    def _copy_tensor(self, path: str, value: Tensor) -> Tensor:
        original, copy = self._last.get(path, (None, None))
        if original is not value or not torch.equal(copy, value):
            # What is learned on the calls needs tensors that gradients can pass.
            with torch.inference_mode(False):
                copy = value.detach().clone()
            self._last[path] = value, copy
        return copy


@contextmanager
def recorded_calls(module: nn.Module) -> Iterator[list[Call]]:
    """Record the calls of a module while open."""
    recorder = CallRecorder()
    handle = module.register_forward_pre_hook(recorder, with_kwargs=True)
    try:
        yield recorder.calls
    finally:
        handle.remove()


def batch_size(call: Call, batched: Sequence[str]) -> int:
    """Count the images of a call; it is one where no argument is known to hold several."""
    return next(_counts(call.get(name) for name in batched), 1)


def _counts(values: Iterable[Any]) -> Iterator[int]:
    """Count the entries of tensors and lists, on their own or in dicts of them."""
    for value in values:
        if isinstance(value, dict):
            yield from _counts(value.values())
        elif isinstance(value, Tensor | list):
            yield len(value)


def can_stack(calls: Sequence[Call], batched: Sequence[str]) -> bool:
    """Tell whether calls differ in arguments with an entry per image alone, and these in values."""
    first, images = calls[0], batch_size(calls[0], batched)
    return bool(batched) and all(call.keys() == first.keys() for call in calls) and all(
        _stacks([call[name] for call in calls], name in batched, images) for name in first)


def _stacks(values: list[Any], is_batched: bool, images: int) -> bool:
    first = values[0]
    if is_batched and isinstance(first, dict):
        if not all(isinstance(value, dict) and value.keys() == first.keys() for value in values):
            return False
        return all(_stacks([value[key] for value in values], True, images) for key in first)
    if is_batched and isinstance(first, list):
        return all(isinstance(value, list) and len(value) == images for value in values)
    if is_batched and isinstance(first, Tensor):
        return first.dim() > 0 and all(
            isinstance(value, Tensor) and len(value) == images and value.shape == first.shape
            for value in values)
    return all(_same(value, first) for value in values)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return a is b or both and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b


def stack(calls: Sequence[Call], batched: Sequence[str]) -> Call:
    """Make one call of several (see ``can_stack``), image after image."""
    return _combined(calls, batched, _joined)


def _joined(values: list[Entries]) -> Entries:
    """Join tensors, or lists, along their entries."""
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [entry for value in values for entry in value]


def _combined(
    calls: Sequence[Call], batched: Sequence[str], combine: Callable[[list[Entries]], Entries]
) -> Call:
    """Combine what the calls have for each image; the rest is that of the first call."""
    combined = dict(calls[0])
    for name in batched:
        if name in combined:
            combined[name] = _combine([call[name] for call in calls], combine)
    return combined


def _combine(values: list[Any], combine: Callable[[list[Entries]], Entries]) -> Any:
    """Combine tensors and lists, on their own or in dicts; other values are all the same."""
    first = values[0]
    if isinstance(first, Tensor | list):
        return combine(values)
    if isinstance(first, dict):
        return {key: _combine([value[key] for value in values], combine) for key in first}
    return first


def take(calls: Sequence[Call], picks: Tensor, batched: Sequence[str]) -> Call:
    """Make a call of single images: ``picks`` (P, 2) names each one's call and its number there.

    Raises:
        ValueError: the calls have other shapes or other arguments than one another.
    """
    if not can_stack(calls, batched):
        raise ValueError("this recipe draws images from all calls of the model: "
                         "expected calls that differ in their images only")
    chosen = picks.tolist()

    def pick_images(values: list[Entries]) -> Entries:
        entries = [values[call][image] for call, image in chosen]
        return torch.stack(entries) if isinstance(values[0], Tensor) else entries

    return _combined(calls, batched, pick_images)
