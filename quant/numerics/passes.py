"""Single-pass loops over rows of float32, parallel over the CPU's cores.

numba compiles them on first use and keeps the result in ``__pycache__``.
"""
import numba
import numpy as np
import torch
from numba import njit, prange

# Lets sums be vectors; what comes in must be finite.
RELAXED = {"nnan", "ninf", "nsz", "reassoc", "contract"}
OPTIONS = {"cache": True, "fastmath": RELAXED, "error_model": "numpy"}
# Each operation rounds as PyTorch's does.
EXACT = OPTIONS | {"fastmath": {"nnan", "ninf", "nsz"}}

# Rows and columns of a tile that stays in the fastest cache.
ROWS = 64
COLUMNS = 128

LARGEST_FLOAT = np.finfo(np.float32).max
LARGEST_INT8 = np.float32(np.iinfo(np.int8).max)


def use_threads(count: int) -> None:
    """Run the kernels below on at most ``count`` cores; PyTorch's operators keep ``count``."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    # The first call starts numba's threads, which sets OpenMP's number for all libraries.
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@njit(**OPTIONS)
def _update_extremes(columns, factors, low, high):
    """Extend the extremes of ROWS rows by ``columns * factors``, in place.

    Args:
        columns: (C, ROWS), inputs of the rows side by side.
        factors: (C,) or more.
        low, high: (ROWS,), least and largest so far.
    """
    last = len(columns) - 1
    # Four columns at a time, because reading and writing low and high takes longest.
    for i in range(0, len(columns), 4):
        j = min(i + 1, last)
        k = min(i + 2, last)
        n = min(i + 3, last)
        first, second, third, fourth = columns[i], columns[j], columns[k], columns[n]
        for r in range(ROWS):
            t = first[r] * factors[i]
            u = second[r] * factors[j]
            v = third[r] * factors[k]
            w = fourth[r] * factors[n]
            least = min(min(t, u), min(v, w))
            largest = max(max(t, u), max(v, w))
            low[r] = least if least < low[r] else low[r]
            high[r] = largest if largest > high[r] else high[r]


@njit(parallel=True, **OPTIONS)
def extremes(x, factors, low, high):
    """Find the least and the largest ``x * factors`` of every row, for several factors.

    Loops go along rows, because this vectorises and a search for extremes along a row does not.

    Args:
        x: (M, I).
        factors: (A, I).
        low, high: (A, M), written.
    """
    for block in prange((len(x) + ROWS - 1) // ROWS):
        start = block * ROWS
        stop = min(block * ROWS + ROWS, len(x))
        columns = np.empty((COLUMNS, ROWS), np.float32)
        least = np.full((len(factors), ROWS), LARGEST_FLOAT)
        largest = np.full((len(factors), ROWS), -LARGEST_FLOAT)
        for first in range(0, x.shape[1], COLUMNS):
            count = min(COLUMNS, x.shape[1] - first)
            # The tile, transposed; a last block of fewer rows repeats its last.
            for r in range(ROWS):
                row = x[min(start + r, stop - 1)]
                for i in range(count):
                    columns[i, r] = row[first + i]
            for a in range(len(factors)):
                _update_extremes(columns[:count], factors[a, first:], least[a], largest[a])
        low[:, start:stop] = least[:, :stop - start]
        high[:, start:stop] = largest[:, :stop - start]


@njit(parallel=True, **OPTIONS)
def codes(x, factors, scale, zero, top, out):
    """Quantise ``x * factors`` to codes from 0 to ``top``: ``round(x * factors / scale) + zero``.

    Args:
        x: (M, I).
        factors: (I,).
        scale, zero: (M,).
        top: the largest code.
        out: (M, I) uint8, written.
    """
    for m in prange(x.shape[0]):
        inverse = np.float32(1) / scale[m]
        offset = zero[m]
        for i in range(x.shape[1]):
            code = np.rint(x[m, i] * factors[i] * inverse) + offset
            out[m, i] = np.int32(min(max(code, np.float32(0)), top))


@njit(parallel=True, **OPTIONS)
def fake_quantized(x, factors, scale, zero, top, columns, out):
    """Quantise as ``codes`` does, turn codes back into values and multiply these by ``columns``.

    Args:
        x: (M, I).
        factors, columns: (I,).
        scale, zero: (M,).
        top: the largest code.
        out: (M, I) float32, written.
    """
    for m in prange(x.shape[0]):
        inverse = np.float32(1) / scale[m]
        offset = zero[m]
        for i in range(x.shape[1]):
            code = np.rint(x[m, i] * factors[i] * inverse)
            out[m, i] = min(max(code, -offset), top - offset) * scale[m] * columns[i]


@njit(parallel=True, **OPTIONS)
def squared_errors(sums, offsets, step, scale, zero, bias, y, out):
    """Compute ``|scale step (sums - zero offsets) + bias - y|^2`` of every row.

    Args:
        sums: (M, O) float32 or int32.
        offsets, step, bias: (O,).
        scale, zero: (M,).
        y: (M, O).
        out: (M,), written.
    """
    for m in prange(y.shape[0]):
        total = np.float32(0)
        for o in range(y.shape[1]):
            product = (np.float32(sums[m, o]) - zero[m] * offsets[o]) * step[o] * scale[m]
            difference = product + (bias[o] - y[m, o])
            total += difference * difference
        out[m] = total


@njit(parallel=True, **EXACT)
def round_to_int8(weight, factors, group, top, values, step, sums):
    """Round ``diag(s) weight`` to int8 for several factors s, as ``two_level.round_to_int8`` does.

    Groups go along inputs and loops along outputs, which vectorises.

    Args:
        weight: (I, O).
        factors: (A, I).
        group: inputs per group.
        top: the largest code.
        values: (A, I, O) int8, written.
        step: (A, O), what one of the values stands for, written.
        sums: (A, O), sums of values along inputs, written.
    """
    inputs, outputs = weight.shape
    for a in prange(len(factors)):
        scale = np.empty((inputs // group, outputs), np.float32)
        # Codes less their zero point end here.
        top_code = np.empty((inputs // group, outputs), np.float32)
        low = np.empty(outputs, np.float32)
        high = np.empty(outputs, np.float32)
        largest = np.zeros(outputs, np.float32)

        # Scales of the groups, and the largest magnitude that an output channel's codes stand for.
        for g in range(inputs // group):
            rows = slice(g * group, (g + 1) * group)
            _group_range(weight[rows], factors[a, rows], low, high)
            _group_scale(low, high, top, scale[g], top_code[g], largest)

        # One step per output channel, and every weight in it.
        for o in range(outputs):
            step[a, o] = largest[o] / LARGEST_INT8 if largest[o] > 0 else np.float32(1)
        sums[a] = 0
        for i in range(inputs):
            g = i // group
            _round_row(
                weight[i], factors[a, i], scale[g], top_code[g], step[a], values[a, i], sums[a])


@njit(**EXACT)
def _group_range(weight, factors, low, high):
    """Find the range of one group of ``diag(factors) weight`` (g, O), 0 included.

    Args:
        low, high: (O,), written.
    """
    low[:] = 0
    high[:] = 0
    for i in range(len(weight)):
        factor = factors[i]
        for o in range(weight.shape[1]):
            value = weight[i, o] * factor
            low[o] = value if value < low[o] else low[o]
            high[o] = value if value > high[o] else high[o]


@njit(**EXACT)
def _group_scale(low, high, top, scale, top_code, largest):
    """Find the scales of one group from its range.

    Args:
        low, high: (O,).
        top: the largest code.
        scale: (O,), written.
        top_code: (O,), the largest code less the zero point, written.
        largest: (O,), the largest magnitude so far that a code stands for, updated.
    """
    for o in range(len(low)):
        width = high[o] - low[o]
        scale[o] = width * np.float32(1 / top) if width > 0 else np.float32(1)
        zero = np.rint(-(low[o] / scale[o]))
        top_code[o] = top - zero
        magnitude = scale[o] * max(zero, top_code[o]) if width > 0 else np.float32(0)
        largest[o] = magnitude if magnitude > largest[o] else largest[o]


@njit(**EXACT)
def _round_row(weight, factor, scale, top_code, step, values, sums):
    """Round the weights of one input, (O,), to codes, and what these stand for to int8.

    Args:
        scale, top_code: (O,), of the input's group.
        step: (O,).
        values: (O,) int8, written.
        sums: (O,), to which the values are added.
    """
    for o in range(len(weight)):
        code = np.rint(weight[o] * factor / scale[o])
        code = code if code < top_code[o] else top_code[o]
        value = np.rint(code * (scale[o] / step[o]))
        values[o] = np.int32(value)
        sums[o] += value


@njit(**OPTIONS)
def _group_error(group, cost, scale, low, high):
    """Sum ``cost`` times the squared errors of a group, (g,), rounded to a grid.

    The grid is ``scale`` times the integers from ``low`` to ``high``.
    """
    total = np.float32(0)
    for i in range(len(group)):
        value = np.rint(group[i] / scale)
        value = value if value > low else low
        value = value if value < high else high
        difference = value * scale - group[i]
        total += difference * difference * cost[i]
    return total


@njit(parallel=True, **EXACT)
def two_level_scales(groups, steps, cost, top, offsets, scales, errors):
    """Find integer scales of least error, as ``quant.weights.two_level.least_errors`` does.

    Args:
        groups: (O, G, g).
        steps: (F, O).
        cost: (G, g), what a squared error counts.
        top: the largest code.
        offsets: (K,), tried from the scale just below the one that spans a group's range.
        scales, errors: (F, O, G), written.
    """
    zero = np.float32(0)
    one = np.float32(1)
    for o in prange(len(groups)):
        for g in range(groups.shape[1]):
            low, high = zero, zero
            for value in groups[o, g]:
                low, high = min(low, value), max(high, value)
            for f in range(len(steps)):
                below = np.floor((high - low) / (steps[f, o] * top))
                for k in range(len(offsets)):
                    scale = min(max(below + offsets[k], one), LARGEST_INT8)
                    code_scale = scale * steps[f, o]
                    # Codes less their zero point that still fit int8 after scaling.
                    bound = np.floor(LARGEST_INT8 / scale)
                    shift = min(np.rint(-low / code_scale), top)
                    lowest = max(-shift, -bound)
                    highest = min(top - shift, bound)
                    error = _group_error(groups[o, g], cost[g], code_scale, lowest, highest)
                    if k == 0 or error < errors[f, o, g]:
                        scales[f, o, g] = scale
                        errors[f, o, g] = error
