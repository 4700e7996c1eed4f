"""What the arguments of a model's calls mean, seen from the calls alone."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from architectures.sites import Call
from architectures.tracing import images_of, tensors_of
from quant.calibration.calls import can_stack, stack

# Two batches of images may be multiplied by other kernels than one.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def batched_arguments(model: nn.Module, call: Call) -> tuple[str, ...]:
    """Name the arguments with an entry per image: given twice, they make every output twice.

    If those that look like it do not, there are none: calls are then not made together.

    Args:
        model: in eval mode.
        call: arguments of its ``forward``.
    """
    images = images_of(call)
    names = tuple(name for name, value in call.items() if _has_entries(value, images))
    stacks = can_stack([call, call], names) and _gives_twice(model, call, names)
    return names if stacks else ()


def _has_entries(value: Any, images: int) -> bool:
    if isinstance(value, dict):
        return any(_has_entries(item, images) for item in value.values())
    if isinstance(value, list):
        return len(value) == images and all(isinstance(entry, Tensor) for entry in value)
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == images


def _gives_twice(model: nn.Module, call: Call, names: tuple[str, ...]) -> bool:
    """Tell whether a call with every image twice gives every output twice."""
    expected = tensors_of(model(**call))
    try:
        outputs = tensors_of(model(**stack([call, call], names)))
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        # One argument too many was given twice, or one too few.
        return False
    if len(outputs) == len(expected):
        return all(map(_is_twice, outputs, expected))
    # They are lists with an entry per image.
    return len(outputs) == 2 * len(expected) and all(map(_is_near, outputs, 2 * expected))


def _is_twice(output: Tensor, half: Tensor) -> bool:
    return half.dim() > 0 and _is_near(output, torch.cat([half, half]))


def _is_near(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    error = (output - expected).norm() / expected.norm()
    return bool(error <= TOLERANCE.get(expected.dtype, 0.0))


def clock_of(calls: Sequence[Call]) -> str:
    """Name the argument that holds the timesteps: numbers that change from call to call.

    Returns:
        The first such argument; of a single call the first of a number per image; empty: none.
    """
    images = images_of(calls[0])
    candidates = [name for name, value in calls[0].items() if _is_time(value, images)]
    for name in candidates:
        if any(not torch.equal(_flat(call[name]), _flat(calls[0][name])) for call in calls[1:]):
            return name
    return candidates[0] if candidates else ""


def _is_time(value: Any, images: int) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return True
    return (isinstance(value, Tensor) and value.dtype != torch.bool
            and (value.dim() == 0 or value.dim() == 1 and len(value) == images))


def _flat(value: Any) -> Tensor:
    return torch.as_tensor(value).reshape(-1)
