"""Two-level scales: integer group scales inside one floating scale per output channel (after Dai et al., VS-Quant, 2021).

A group's weights are ``step_o * k_og * (q - z_og)`` with integers k, q, z and ``|k (q - z)| <= 127``: a weight quantised in groups
expands exactly to int8, and its product with int8 activations stays one integer product per layer.
"""
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from quant.numerics.uniform import (
    Grid,
    Quantized,
    QuantSpec,
    grouped,
    scale_and_zero,
    signed_codes_,
)

LIMIT = 127  # of int8, symmetric
STEP_FACTORS = (0.9, 1.0, 1.07, 1.14, 1.22, 1.3)  # tried, of the step that just holds the channel's largest weight
SCALE_OFFSETS = (-1, 0, 1, 2)  # tried, from the integer scale just below the one that spans the group's range
BLOCK = 2 ** 18  # weights handled at a time: small enough to stay in a CPU's cache between passes


def find_steps(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Tensor:
    """Each output channel's step of least error, (O, 1), bfloat16 values, so that they are stored as such.

    Args:
        importance: (I,) weights of the squared errors, such as the second moment of the inputs; None for all the same.
    """
    groups, cost = _view(weight, importance, spec)
    relative = groups.new_tensor([factor / LIMIT for factor in STEP_FACTORS])
    steps = (relative[:, None] * groups.abs().amax((1, 2))).bfloat16().float()  # (F, O)
    steps.masked_fill_(steps == 0, 1.0)
    _, error = _search(groups)(groups, steps, cost, spec)
    return steps.gather(0, error.sum(2).argmin(0, keepdim=True)).T


def two_level_grid(groups: Tensor, step: Tensor, importance: Tensor | None, spec: QuantSpec) -> Grid:
    """The codes' values for groups (O, G, g) of weights with steps (O, 1): integer scales of least error.

    Args:
        importance: (G, g), or None, as in ``find_steps``.
    """
    cost = groups.new_ones(groups.shape[1:]) if importance is None else importance
    scale, _ = _search(groups)(groups, step.T, cost, spec)
    return _grid(groups.amin(-1, keepdim=True).clamp_(max=0), scale[0, ..., None], step[:, None], spec)


def least_errors(groups: Tensor, steps: Tensor, cost: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Integer scales of least squared error, and these errors.

    Args:
        groups: (O, G, g); steps: (F, O), several for each output channel; cost: (G, g), weights of the errors.

    Returns:
        (F, O, G) float32 each.
    """
    rows = max(1, BLOCK // groups[0].numel())
    parts = [torch.stack([torch.stack(_find_scales(some, step[:, None, None], cost, spec)) for step in of_some])
             for some, of_some in zip(groups.split(rows), steps.split(rows, 1))]
    return torch.cat(parts, 2)[..., 0].unbind(1)


def fused_least_errors(groups: Tensor, steps: Tensor, cost: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """As ``least_errors``, on a CPU."""
    from quant.numerics import passes
    passes.use_threads(torch.get_num_threads())
    scales, errors = torch.empty(2, *steps.shape, groups.shape[1])
    values = (each.contiguous().numpy() for each in (groups, steps, cost))
    passes.two_level_scales(*values, np.float32(spec.top), np.float32(SCALE_OFFSETS), scales.numpy(), errors.numpy())
    return scales, errors


def quantize_two_level(weight: Tensor, spec: QuantSpec, importance: Tensor | None, step: Tensor) -> Quantized:
    """Quantise a weight (O, I) in groups, with given steps (O, 1) and integer scales of least error; for ``importance`` see ``find_steps``.

    Raises:
        ValueError: the weight holds NaN or infinity, or does not divide into groups.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("cannot quantise a tensor that holds NaN or infinity")
    groups, cost = _view(weight, importance, spec)
    size = max(1, BLOCK // weight.shape[1])
    codes, scale, zero = [], [], []
    for rows, steps in zip(groups.split(size), step.split(size)):
        grid = two_level_grid(rows, steps, cost, spec)
        codes.append(grid.signed(rows).add_(grid.zero[..., None]).to(torch.uint8))
        scale.append(grid.code_scale)
        zero.append(grid.zero)
    return Quantized(torch.cat(codes).reshape(weight.shape), torch.cat(scale)[..., None], torch.cat(zero)[..., None], spec, step)


def round_to_int8(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """A weight (O, I) rounded in groups with floating scales, and the result to int8 with one step per output channel.

    About as near as two-level scales come after their search, at a small part of its time. Gives values (O, I) and steps (O,).
    """
    groups, _ = grouped(weight, spec)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # (O, G, 1)
    scale, zero = scale_and_zero(low, high, spec)
    peak = (scale * torch.maximum(zero, spec.top - zero)).masked_fill_((low == 0) & (high == 0), 0.0)
    step = peak.amax(1, keepdim=True) / LIMIT  # (O, 1, 1)
    step.masked_fill_(step == 0, 1.0)
    values = signed_codes_(groups / scale, zero, spec).mul_(scale / step).round_()
    return values.to(torch.int8).view_as(weight), step.flatten()


def _view(weight: Tensor, importance: Tensor | None, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Groups (O, G, g) and what their errors count, (G, g)."""
    groups, _ = grouped(weight, spec)
    return groups, groups.new_ones(groups.shape[1:]) if importance is None else importance.view_as(groups[0])


def _search(groups: Tensor) -> Callable[[Tensor, Tensor, Tensor, QuantSpec], tuple[Tensor, Tensor]]:
    return fused_least_errors if groups.device.type == "cpu" and find_spec("numba") is not None else least_errors


def _find_scales(groups: Tensor, step: Tensor, cost: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Integer scales of least error and these errors, (O, G, 1), given steps (O, 1, 1)."""
    low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)  # (O, G, 1)
    below = ((high - low) / (step * spec.top)).floor()
    scales = torch.stack([(below + offset).clamp(1, LIMIT) for offset in SCALE_OFFSETS])  # (K, O, G, 1)
    error, index = torch.stack([_error(groups, _grid(low, scale, step, spec), cost) for scale in scales]).min(0)
    return scales.gather(0, index[None])[0], error


def _grid(low: Tensor, scale: Tensor, step: Tensor, spec: QuantSpec) -> Grid:
    """From the groups' lowest weights and integer scales (O, G, 1) and steps (O, 1, 1)."""
    scale, whole = scale[..., 0], (scale * step)[..., 0]
    zero = (-low[..., 0] / whole).round_().clamp_(max=spec.top)
    bound = (LIMIT / scale).floor_()
    return Grid(whole, zero, torch.maximum(-zero, -bound), torch.minimum(spec.top - zero, bound), scale)


def _error(groups: Tensor, grid: Grid, cost: Tensor) -> Tensor:
    """Weighted squared error of every group, (O, G, 1)."""
    return grid.signed(groups).mul_(grid.scale[..., None]).sub_(groups).square_().mul_(cost).sum(-1, keepdim=True)
