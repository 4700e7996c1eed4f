"""One pass each over rows of float32, side by side on the processor's cores, compiled by numba when first called (and kept in __pycache__)."""
import numba
import numpy as np
import torch
from numba import njit, prange

RELAXED = {"nnan", "ninf", "nsz", "reassoc", "contract"}  # lets sums be vectors; what comes in must be finite
OPTIONS = {"cache": True, "fastmath": RELAXED, "error_model": "numpy"}
EXACT = OPTIONS | {"fastmath": {"nnan", "ninf", "nsz"}}  # each operation rounds as PyTorch's does
ROWS, COLUMNS = 64, 128  # of a tile that stays in the fastest cache
HUGE = np.finfo(np.float32).max


def use_threads(count: int) -> None:
    """Run what follows on at most ``count`` of the processor's cores, PyTorch's operators included."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != count:  # the first call starts numba's threads, which sets OpenMP's number for all libraries
        torch.set_num_threads(count)


@njit(**OPTIONS)
def _widen(columns, factors, low, high):
    last = len(columns) - 1
    for i in range(0, len(columns), 4):  # four at a time, because reading and writing low and high takes longest
        j, k, n = min(i + 1, last), min(i + 2, last), min(i + 3, last)
        first, second, third, fourth = columns[i], columns[j], columns[k], columns[n]
        for r in range(ROWS):
            t, u, v, w = first[r] * factors[i], second[r] * factors[j], third[r] * factors[k], fourth[r] * factors[n]
            less, more = min(min(t, u), min(v, w)), max(max(t, u), max(v, w))
            low[r] = less if less < low[r] else low[r]
            high[r] = more if more > high[r] else high[r]


@njit(parallel=True, **OPTIONS)
def extremes(x, factors, low, high):
    """Least and largest ``x * factors`` of every row, for several factors.

    Loops go along rows, because this vectorises and a search for extremes along a row does not.

    Args:
        x: (M, I); factors: (A, I); low, high: (A, M), written.
    """
    for block in prange((len(x) + ROWS - 1) // ROWS):
        start, stop = block * ROWS, min(block * ROWS + ROWS, len(x))
        columns = np.empty((COLUMNS, ROWS), np.float32)
        least, largest = np.full((len(factors), ROWS), HUGE), np.full((len(factors), ROWS), -HUGE)
        for begin in range(0, x.shape[1], COLUMNS):
            count = min(COLUMNS, x.shape[1] - begin)
            for r in range(ROWS):
                row = x[min(start + r, stop - 1)]
                for i in range(count):
                    columns[i, r] = row[begin + i]
            for a in range(len(factors)):
                _widen(columns[:count], factors[a, begin:], least[a], largest[a])
        low[:, start:stop], high[:, start:stop] = least[:, :stop - start], largest[:, :stop - start]


@njit(parallel=True, **OPTIONS)
def codes(x, factors, scale, zero, top, out):
    """``round(x * factors / scale) + zero``, not below 0 and not above ``top``.

    Args:
        x: (M, I); factors: (I,); scale, zero: (M,); out: (M, I) uint8, written.
    """
    for m in prange(x.shape[0]):
        inverse, offset = np.float32(1) / scale[m], zero[m]
        for i in range(x.shape[1]):
            code = np.rint(x[m, i] * factors[i] * inverse) + offset
            out[m, i] = np.int32(min(max(code, np.float32(0)), top))


@njit(parallel=True, **OPTIONS)
def fake_quantized(x, factors, scale, zero, top, columns, out):
    """What ``codes`` stand for, times ``columns`` (I,); ``out``: (M, I) float32, written."""
    for m in prange(x.shape[0]):
        inverse, offset = np.float32(1) / scale[m], zero[m]
        for i in range(x.shape[1]):
            code = np.rint(x[m, i] * factors[i] * inverse)
            out[m, i] = min(max(code, -offset), top - offset) * scale[m] * columns[i]


@njit(parallel=True, **OPTIONS)
def squared_errors(sums, offsets, step, scale, zero, bias, y, out):
    """``|scale step (sums - zero offsets) + bias - y|^2`` of every row.

    Args:
        sums: (M, O) float32 or int32; y: (M, O); offsets, step, bias: (O,); scale, zero: (M,); out: (M,), written.
    """
    for m in prange(y.shape[0]):
        total = np.float32(0)
        for o in range(y.shape[1]):
            difference = (np.float32(sums[m, o]) - zero[m] * offsets[o]) * step[o] * scale[m] + (bias[o] - y[m, o])
            total += difference * difference
        out[m] = total


@njit(parallel=True, **EXACT)
def round_to_int8(weight, factors, group, top, values, step, sums):
    """``quant.weights.two_level.round_to_int8`` of ``diag(s) weight`` for several factors s; groups go along inputs, loops along outputs, which vectorises.

    Args:
        weight: (I, O); factors: (A, I); top: largest code; values: (A, I, O) int8, step: (A, O) and sums of values: (A, O), written.
    """
    inputs, outputs = weight.shape
    for a in prange(len(factors)):
        scale, room = np.empty((inputs // group, outputs), np.float32), np.empty((inputs // group, outputs), np.float32)
        low, high, peak = np.empty(outputs, np.float32), np.empty(outputs, np.float32), np.zeros(outputs, np.float32)
        for g in range(inputs // group):
            low[:], high[:] = 0, 0
            for i in range(g * group, (g + 1) * group):
                factor = factors[a, i]
                for o in range(outputs):
                    value = weight[i, o] * factor
                    low[o] = value if value < low[o] else low[o]
                    high[o] = value if value > high[o] else high[o]
            for o in range(outputs):
                width = high[o] - low[o]
                scale[g, o] = width * np.float32(1 / top) if width > 0 else np.float32(1)
                zero = np.rint(-(low[o] / scale[g, o]))
                room[g, o] = top - zero
                reach = scale[g, o] * max(zero, room[g, o]) if width > 0 else np.float32(0)
                peak[o] = reach if reach > peak[o] else peak[o]
        for o in range(outputs):
            step[a, o] = peak[o] / np.float32(127) if peak[o] > 0 else np.float32(1)
        sums[a] = 0
        for i in range(inputs):
            factor, spacing, limit = factors[a, i], scale[i // group], room[i // group]
            for o in range(outputs):
                code = np.rint(weight[i, o] * factor / spacing[o])
                code = code if code < limit[o] else limit[o]
                value = np.rint(code * (spacing[o] / step[a, o]))
                values[a, i, o] = np.int32(value)
                sums[a, o] += value


@njit(**OPTIONS)
def _group_error(group, cost, scale, low, high):
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
    """``quant.weights.two_level.least_errors``.

    Args:
        groups: (O, G, g); steps: (F, O); cost: (G, g); top: largest code; offsets: (K,); scales, errors: (F, O, G), written.
    """
    zero, one, limit = np.float32(0), np.float32(1), np.float32(127)
    for o in prange(len(groups)):
        for g in range(groups.shape[1]):
            low, high = zero, zero
            for value in groups[o, g]:
                low, high = min(low, value), max(high, value)
            for f in range(len(steps)):
                below = np.floor((high - low) / (steps[f, o] * top))
                for k in range(len(offsets)):
                    scale = min(max(below + offsets[k], one), limit)
                    whole, bound = scale * steps[f, o], np.floor(limit / scale)
                    shift = min(np.rint(-low / whole), top)
                    error = _group_error(groups[o, g], cost[g], whole, max(-shift, -bound), min(top - shift, bound))
                    if k == 0 or error < errors[f, o, g]:
                        scales[f, o, g], errors[f, o, g] = scale, error
