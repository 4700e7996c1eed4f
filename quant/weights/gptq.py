"""GPTQ: rounding a weight one input channel at a time (Frantar et al., 2023).

The error of each channel is made up for by the channels still to come, as far as their inputs
correlate with its own.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from quant.numerics.cholesky import damped_cholesky
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import Grid, Quantized, check_finite, grouped

BLOCK_CHANNELS = 128  # input channels between two updates of all that are left
GPTQ_DAMPING = 0.01  # of the Hessian's mean diagonal, added to its diagonal

# Makes the grid of consecutive groups from their weights (O, k, g) and their numbers in the layer.
GridMaker = Callable[[Tensor, slice], Grid]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Compute the upper triangular U with ``U^T U = (H + damping mean(diag H) I)^-1``, (I, I).

    With the channels in reverse order, H = P L L^T P, and U is the inverse of the upper triangular
    P L P. That is one factorisation and one triangular inverse, instead of two factorisations and a
    full inverse.
    """
    filled = hessian.clone()
    diagonal = filled.diagonal()
    # An input that is always zero: its weights may be anything.
    diagonal[diagonal == 0] = 1.0
    upper = damped_cholesky(filled.flip(0, 1), damping * diagonal.mean()).flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def gptq_quantize(
    weight: Tensor,
    factor: Tensor,
    spec: QuantSpec,
    make_grid: GridMaker,
    step: Tensor | None = None,
    block: int = BLOCK_CHANNELS,
) -> Quantized:
    """Quantise a weight so that ``|X (W - W_hat)^T|`` is small, not ``|W - W_hat|``.

    A group's grid is made when the first block that holds a part of it is reached, from the weights
    as corrected so far.

    Args:
        weight: (O, I) float32.
        factor: (I, I), ``inverse_factor`` of ``X^T X`` of the inputs X, or of any multiple of it.
        spec: per output channel, or groups of consecutive inputs.
        make_grid: see ``GridMaker``.
        step: passed on to the result (see ``Quantized``).
        block: input channels between two updates of all that are left.

    Raises:
        ValueError: the weight holds NaN or infinity, or does not divide into groups.
    """
    check_finite(weight)
    rows, columns = weight.shape
    size = columns
    if spec.granularity == "group":
        size = grouped(weight, spec)[0].shape[-1]
    # Transposed, so that one input channel after the other lies together: (I, O).
    corrected = weight.T.clone(memory_format=torch.contiguous_format)
    signed = torch.empty_like(corrected)
    grids: list[Grid] = []
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        # Make the grids of all groups that begin in this block.
        first, last = len(grids), -(-end // size)
        if last > first:
            groups = _group(corrected[first * size:last * size].T, spec)
            grid = make_grid(groups, slice(first, last))
            grids += [grid.select(k) for k in range(last - first)]
        # Round its channels, then correct all that come after the block at once.
        here = slice(begin, end)
        channel_grids = [grids[i // size] for i in range(begin, end)]
        errors = _round_block(corrected[here], factor[here, here], channel_grids, signed[here])
        corrected[end:].addmm_(factor[here, end:].T, errors, alpha=-1)
    return _assemble(signed, grids, size, spec, step)


def _group(weight: Tensor, spec: QuantSpec) -> Tensor:
    """View whole groups of a weight, (O, k g), as (O, k, g); without groups a row is one."""
    return grouped(weight, spec)[0] if spec.granularity == "group" else weight[:, None]


def _round_block(corrected: Tensor, factor: Tensor, grids: list[Grid], signed: Tensor) -> Tensor:
    """Round the channels of a block in turn, correcting those that follow in it, in place.

    Args:
        corrected: (b, O), the channels as corrected so far; changed.
        factor: (b, b), the block's part of ``inverse_factor``.
        grids: of the group that each channel is in.
        signed: (b, O), written: integer-valued ``q - zero``.

    Returns:
        The channels' errors (b, O), by which later blocks are corrected.
    """
    errors = torch.empty_like(corrected)
    for i, grid in enumerate(grids):
        row = factor[i, i:]
        values = torch.div(corrected[i], grid.scale, out=signed[i])
        values.round_().clamp_(grid.low, grid.high)
        error = torch.addcmul(corrected[i], values, grid.scale, value=-1, out=errors[i])
        error.div_(row[0])
        corrected[i + 1:].addr_(row[1:], error, alpha=-1)
    return errors


def _assemble(
    signed: Tensor, grids: list[Grid], size: int, spec: QuantSpec, step: Tensor | None
) -> Quantized:
    """Put rounded channels (I, O), integer-valued ``q - zero``, and the groups' grids together.

    Args:
        size: channels in a group.
    """
    columns, rows = signed.shape
    shape = (rows, len(grids), 1) if spec.granularity == "group" else (rows, 1)
    scale = torch.stack([grid.code_scale for grid in grids], 1)  # (O, G)
    zero = torch.stack([grid.zero for grid in grids], 1)
    codes = signed.T + zero.repeat_interleave(size, 1)[:, :columns]
    return Quantized(
        codes.to(torch.uint8).contiguous(),
        scale.reshape(shape),
        zero.reshape(shape),
        spec,
        step,
    )
