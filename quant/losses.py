"""What quantisation does to a layer's outputs, for all candidates of the grid search (see ``quant.search``).

``energies`` is the definition in PyTorch, for any device. ``fused_energies`` gives the same on a CPU in less than half the time: what
surrounds the products is one compiled pass each, and weights of small integers are multiplied on int8.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from quant.candidates import Candidates, fused_rounded, rounded
from quant.integer.cpu import supported
from quant.quantizer import OFF_BITS, QuantSpec, scale_and_zero, signed_codes_

BLOCK = 2 ** 19  # inputs or outputs handled at a time


def energies(x: Tensor, y: Tensor, candidates: Candidates, act: QuantSpec) -> Tensor:
    """Squared norms of ``y - Qa(x / s) (diag(step) values)^T`` for each candidate, (A,) float64.

    Args:
        x: (B, R, I); y: (B, R, O).
        act: of granularity ``token``, or ``image`` for one range per entry of x.
    """
    weights = candidates.values if candidates.step is None else candidates.values * candidates.step[..., None]
    total = torch.zeros(len(weights), dtype=torch.float64, device=x.device)
    for inputs, outputs in _blocks(x, y):
        found, buffer = [], torch.empty_like(inputs)
        ranges = None if act.granularity == "token" else entry_ranges(inputs, candidates.factors, act)
        for i, (s, weight) in enumerate(zip(candidates.factors, weights)):
            torch.div(inputs, s, out=buffer)
            scale = buffer.new_ones(1)
            if act.bits != OFF_BITS:
                if ranges is None:
                    scale, zero = scale_and_zero(buffer.amin(-1, keepdim=True), buffer.amax(-1, keepdim=True), act)
                else:
                    scale, zero = (values[i] for values in ranges)
                signed_codes_(buffer.div_(scale), zero, act)
            difference = torch.matmul(buffer, weight.T).mul_(scale).sub_(outputs).view(-1)
            found.append(torch.dot(difference, difference))
        total += torch.stack(found)
    return total


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some entries at a time, so that what is computed of them is small."""
    entries = max(1, BLOCK // max(x[0].numel(), y[0].numel()))
    return zip(x.split(entries), y.split(entries))


def entry_ranges(x: Tensor, factors: Tensor, act: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point (A, B, 1, 1) of ``x / s`` for all factors (A, I) and entries of ``x`` (B, R, I), which have one range each."""
    s = factors[:, None, None]
    lows = (x.amin(1, keepdim=True) / s).amin(-1, keepdim=True)  # division keeps order: from the extremes of X's columns
    highs = (x.amax(1, keepdim=True) / s).amax(-1, keepdim=True)
    return scale_and_zero(lows, highs, act)


def fused_energies(x: Tensor, y: Tensor, candidates: Candidates, act: QuantSpec) -> Tensor:
    """As ``energies``, on a CPU; codes may differ where a value lies within a rounding error of the middle between two."""
    from quant import fused
    fused.use_threads(torch.get_num_threads())
    values, factors, top = candidates.values, 1 / candidates.factors, np.float32(act.top)
    integer = values.dtype == torch.int8 and supported()
    weights, by_input = values if integer else values.float(), factors.T.contiguous()  # (I, A)
    offsets = values.sum(2, dtype=torch.float32)  # (A, O)
    step = torch.ones_like(offsets) if candidates.step is None else candidates.step
    total = torch.zeros(len(values), dtype=torch.float64)
    for inputs, outputs in _blocks(x, y):
        if act.granularity == "token":
            low, high = torch.empty(2, inputs.shape[0] * inputs.shape[1], len(values))
            fused.extremes(inputs.flatten(0, 1).numpy(), by_input.numpy(), low.numpy(), high.numpy())
            scale, zero = scale_and_zero(low.T.contiguous(), high.T.contiguous(), act)  # (A, M)
        else:
            scale, zero = (each.flatten(1).repeat_interleave(inputs.shape[1], 1) for each in entry_ranges(inputs, candidates.factors, act))
        inputs, outputs = inputs.flatten(0, 1).numpy(), outputs.flatten(0, 1).numpy()
        codes = torch.empty(inputs.shape, dtype=torch.uint8 if integer else torch.float32)
        sums = torch.empty(outputs.shape, dtype=torch.int32 if integer else torch.float32)
        found = np.empty((len(values), len(inputs)), np.float32)
        rows = (each.numpy() for each in (factors, scale, zero, offsets, step))
        for weight, each, s, z, offset, steps, energy in zip(weights, *rows, found):
            fused.codes(inputs, each, s, z, top, codes.numpy())
            (torch._int_mm if integer else torch.mm)(codes, weight.T, out=sums)
            fused.energies(sums.numpy(), offset, steps, s, z, outputs, energy)
        total += torch.from_numpy(found.sum(1, dtype=np.float64))
    return total


@dataclass(frozen=True)
class Arithmetic:
    """How the grid search computes: ``candidates`` from weight, factors and spec, ``energies`` from inputs, outputs, candidates and spec."""

    candidates: Callable[[Tensor, Tensor, QuantSpec], Candidates]
    energies: Callable[[Tensor, Tensor, Candidates, QuantSpec], Tensor]


DEFINITION = Arithmetic(rounded, energies)
FUSED = Arithmetic(fused_rounded, fused_energies)


def fastest(device: torch.device, act: QuantSpec) -> Arithmetic:
    """``FUSED`` where it can be had (without numba it cannot), else ``DEFINITION``."""
    return FUSED if device.type == "cpu" and act.bits != OFF_BITS and find_spec("numba") is not None else DEFINITION
