"""GPTQ: rounding a weight one input channel at a time, each error made up for by the channels still to come (Frantar et al., 2023)."""
from collections.abc import Callable

import torch
from torch import Tensor

from quant.numerics.uniform import Grid, Quantized, QuantSpec, grouped

BLOCK = 128  # input channels between two updates of all that are left
DAMPING = 0.01  # of the Hessian's mean diagonal, added to its diagonal


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with ``U^T U = (H + damping mean(diag H) I)^-1``, (I, I).

    With the channels in reverse order, H = P L L^T P, and U is the inverse of the upper triangular P L P: one factorisation
    and one triangular inverse instead of two factorisations and a full inverse.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always zero, whose weights may be anything
    diagonal += damping * diagonal.mean()
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True)


def gptq_quantize(weight: Tensor, factor: Tensor, spec: QuantSpec, grid: Callable[[Tensor, slice], Grid], step: Tensor | None = None,
                  block: int = BLOCK) -> Quantized:
    """Quantise a weight so that ``|X (W - W_hat)^T|`` is small, not ``|W - W_hat|``.

    Args:
        weight: (O, I) float32.
        factor: (I, I), ``inverse_factor`` of ``X^T X`` of the inputs X, or of any multiple of it.
        spec: per output channel, or groups of consecutive inputs.
        grid: the codes' values for groups (O, k, g) of weights, numbers ``slice`` of the layer's; a group's grid is that of its weights as
            they stand when the block in which it begins is reached.
        step: passed on to the result (see ``Quantized``).

    Raises:
        ValueError: the weight holds NaN or infinity, or does not divide into groups.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("cannot quantise a tensor that holds NaN or infinity")
    size = grouped(weight, spec)[0].shape[-1] if spec.granularity == "group" else weight.shape[1]
    rows, columns = weight.shape
    left = weight.T.clone(memory_format=torch.contiguous_format)  # (I, O): the columns in turn
    signed = torch.empty_like(left)
    grids: list[Grid] = []
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        first, last = len(grids), -(-end // size)  # groups that begin in this block
        if last > first:
            found = grid(left[first * size:last * size].T.unflatten(1, (-1, size)), slice(first, last))
            grids += [found.select(k) for k in range(last - first)]
        errors = left.new_empty(end - begin, rows)
        for i in range(begin, end):
            here, row = grids[i // size], factor[i, i:end]
            values = signed[i]
            torch.div(left[i], here.scale, out=values).round_().clamp_(here.low, here.high)
            error = torch.addcmul(left[i], values, here.scale, value=-1, out=errors[i - begin]).div_(row[0])
            left[i + 1:end].addr_(row[1:], error, alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    shape = (rows, len(grids), 1) if spec.granularity == "group" else (rows, 1)
    scale, zero = (torch.stack([getattr(each, key) for each in grids], 1).reshape(shape) for key in ("code_scale", "zero"))
    codes = signed.T.reshape(rows, len(grids), -1) + zero.reshape(rows, -1, 1)
    return Quantized(codes.to(torch.uint8).reshape(rows, columns), scale, zero, spec, step)
