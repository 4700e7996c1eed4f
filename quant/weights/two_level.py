"""Two-level scales: integer group scales inside one floating scale per output channel.

The idea is that of VS-Quant (Dai et al., 2021). The weights of a group are
``step_o * k_og * (q - z_og)`` with integers k, q, z and ``|k (q - z)| <= 127``. So a weight
quantised in groups expands exactly to int8, and its product with int8 activations stays one
integer product per layer.
"""
import numpy as np
import torch
from torch import Tensor

from quant.numerics.compiled import compiled_available
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import (
    Grid,
    Quantized,
    check_finite,
    grouped,
    scale_and_zero,
    signed_codes_,
)

LIMIT = 127  # of int8, symmetric

# Tried for each channel, as multiples of the step that just holds the channel's largest weight.
STEP_FACTORS = (0.9, 1.0, 1.07, 1.14, 1.22, 1.3)

# Tried for each group, added to the integer scale just below the one that spans the group's range.
SCALE_OFFSETS = (-1, 0, 1, 2)

# Weights handled at a time: few enough to stay in a CPU's cache between passes.
CACHED_WEIGHTS = 2 ** 18


def find_steps(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Tensor:
    """Find each output channel's step of least error.

    Args:
        weight: (O, I).
        importance: (I,) weights of the squared errors, such as the second moment of the inputs;
            None for all the same.

    Returns:
        (O, 1) float32 that bfloat16 can hold, so that steps are stored as such.
    """
    groups, cost = _groups_and_cost(weight, importance, spec)
    relative = groups.new_tensor([factor / LIMIT for factor in STEP_FACTORS])
    largest = groups.abs().amax((1, 2))  # (O,)
    steps = (relative[:, None] * largest).bfloat16().float()  # (F, O)
    steps.masked_fill_(steps == 0, 1.0)
    _, errors = _best_scales(groups, steps, cost, spec)  # (F, O, G)
    best = errors.sum(2).argmin(0, keepdim=True)  # (1, O)
    return steps.gather(0, best).T


def quantize_two_level(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None, step: Tensor
) -> Quantized:
    """Quantise a weight in groups, with given steps and integer scales of least error.

    Args:
        weight: (O, I).
        importance: (I,) or None, as in ``find_steps``.
        step: (O, 1), as from ``find_steps``.

    Raises:
        ValueError: the weight holds NaN or infinity, or does not divide into groups.
    """
    check_finite(weight)
    groups, cost = _groups_and_cost(weight, importance, spec)
    size = max(1, CACHED_WEIGHTS // weight.shape[1])
    codes, scale, zero = [], [], []
    for rows, steps in zip(groups.split(size), step.split(size)):
        grid = two_level_grid(rows, steps, cost, spec)
        codes.append(grid.signed(rows).add_(grid.zero[..., None]).to(torch.uint8))
        scale.append(grid.code_scale)
        zero.append(grid.zero)
    return Quantized(
        torch.cat(codes).reshape(weight.shape),
        torch.cat(scale)[..., None],  # (O, G, 1)
        torch.cat(zero)[..., None],  # (O, G, 1)
        spec,
        step,
    )


def two_level_grid(groups: Tensor, step: Tensor, cost: Tensor, spec: QuantSpec) -> Grid:
    """Build the grid of groups from given steps, with integer scales of least error.

    Args:
        groups: (O, G, g) weights.
        step: (O, 1).
        cost: (G, g), weights of the squared errors.
    """
    scales, _ = _best_scales(groups, step.T, cost, spec)  # (1, O, G)
    low = groups.amin(-1, keepdim=True).clamp_(max=0)  # (O, G, 1)
    return _grid(low, scales[0, ..., None], step[:, None], spec)


def least_errors(
    groups: Tensor, steps: Tensor, cost: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Find integer scales of least squared error for several steps per channel: the definition.

    Args:
        groups: (O, G, g) weights.
        steps: (F, O), F of them for each output channel.
        cost: (G, g), weights of the squared errors.

    Returns:
        The scales and their errors, (F, O, G) float32 each.
    """
    scales = groups.new_empty(*steps.shape, groups.shape[1])
    errors = torch.empty_like(scales)
    size = max(1, CACHED_WEIGHTS // groups[0].numel())
    for start in range(0, len(groups), size):
        rows = slice(start, start + size)
        for f, step in enumerate(steps[:, rows]):
            scale, error = _find_scales(groups[rows], step[:, None, None], cost, spec)
            scales[f, rows] = scale[..., 0]
            errors[f, rows] = error[..., 0]
    return scales, errors


def fused_least_errors(
    groups: Tensor, steps: Tensor, cost: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Do what ``least_errors`` does in one compiled pass on a CPU; the arguments are the same."""
    # Imported here, because numba may be missing and takes a second to load.
    from quant.numerics import passes

    passes.use_threads(torch.get_num_threads())
    scales = torch.empty(*steps.shape, groups.shape[1])
    errors = torch.empty_like(scales)
    passes.two_level_scales(
        groups.contiguous().numpy(),
        steps.contiguous().numpy(),
        cost.contiguous().numpy(),
        np.float32(spec.top),
        np.float32(SCALE_OFFSETS),
        scales.numpy(),
        errors.numpy(),
    )
    return scales, errors


def round_to_int8(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Round a weight in groups with floating scales, and the result to int8 with a step per row.

    Errors are about those of two-level scales after their search, at a small part of its time.

    Args:
        weight: (O, I).

    Returns:
        Values (O, I) int8 and steps (O,) float32.
    """
    groups, _ = grouped(weight, spec)
    low = groups.amin(-1, keepdim=True)  # (O, G, 1)
    high = groups.amax(-1, keepdim=True)
    scale, zero = scale_and_zero(low, high, spec)
    largest = scale * torch.maximum(zero, spec.top - zero)
    largest.masked_fill_((low == 0) & (high == 0), 0.0)
    step = largest.amax(1, keepdim=True) / LIMIT  # (O, 1, 1)
    step.masked_fill_(step == 0, 1.0)
    values = signed_codes_(groups / scale, zero, spec).mul_(scale / step).round_()
    return values.to(torch.int8).view_as(weight), step.flatten()


def _groups_and_cost(
    weight: Tensor, importance: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """View a weight as groups (O, G, g), and what its errors count as (G, g)."""
    groups, _ = grouped(weight, spec)
    if importance is None:
        return groups, groups.new_ones(groups.shape[1:])
    return groups, importance.view_as(groups[0])


def _best_scales(
    groups: Tensor, steps: Tensor, cost: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Find scales as ``least_errors`` defines them, in the fastest way there is here."""
    search = fused_least_errors if compiled_available(groups.device) else least_errors
    return search(groups, steps, cost, spec)


def _find_scales(
    groups: Tensor, step: Tensor, cost: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Find integer scales of least error and these errors, (O, G, 1), given steps (O, 1, 1)."""
    low = groups.amin(-1, keepdim=True).clamp_(max=0)  # (O, G, 1)
    high = groups.amax(-1, keepdim=True).clamp_(min=0)
    below = ((high - low) / (step * spec.top)).floor()
    scales = torch.stack([(below + offset).clamp(1, LIMIT) for offset in SCALE_OFFSETS])
    grids = [_grid(low, scale, step, spec) for scale in scales]
    errors = torch.stack([_error(groups, grid, cost) for grid in grids])  # (K, O, G, 1)
    error, index = errors.min(0)
    return scales.gather(0, index[None])[0], error


def _grid(low: Tensor, scale: Tensor, step: Tensor, spec: QuantSpec) -> Grid:
    """Build the grid of groups from their lowest weights, integer scales and steps.

    Args:
        low, scale: (O, G, 1); step: (O, 1, 1).
    """
    distance = (scale * step)[..., 0]  # (O, G)
    scale = scale[..., 0]
    zero = (-low[..., 0] / distance).round_().clamp_(max=spec.top)
    bound = (LIMIT / scale).floor_()
    lowest = torch.maximum(-zero, -bound)
    highest = torch.minimum(spec.top - zero, bound)
    return Grid(distance, zero, lowest, highest, scale)


def _error(groups: Tensor, grid: Grid, cost: Tensor) -> Tensor:
    """Sum the weighted squared errors of every group, (O, G, 1)."""
    error = grid.signed(groups).mul_(grid.scale[..., None]).sub_(groups)
    return error.square_().mul_(cost).sum(-1, keepdim=True)
