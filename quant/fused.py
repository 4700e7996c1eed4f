"""One pass each over rows of float32, side by side on the processor's cores, compiled by numba when first called (and kept in __pycache__)."""
import numba
import numpy as np
import torch
from numba import njit, prange

RELAXED = {"nnan", "ninf", "nsz", "reassoc", "contract"}  # lets sums be vectors; what comes in must be finite
OPTIONS = {"cache": True, "fastmath": RELAXED, "error_model": "numpy"}
EXACT = OPTIONS | {"fastmath": {"nnan", "ninf", "nsz"}}  # each operation rounds as PyTorch's does


def use_threads(count: int) -> None:
    """Run what follows on at most ``count`` of the processor's cores, PyTorch's operators included."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != count:  # the first call starts numba's threads, which sets OpenMP's number for all libraries
        torch.set_num_threads(count)


@njit(**OPTIONS)
def _widen(values, factors, low, high):
    for i in range(0, values.shape[0], 2):  # two at a time, because reading and writing low and high takes longest
        j = min(i + 1, values.shape[0] - 1)
        one, two, first, second = values[i], values[j], factors[i], factors[j]
        for a in range(first.shape[0]):  # innermost, because this vectorises and a search for extremes along a row does not
            u, v = one * first[a], two * second[a]
            less, more = u if u < v else v, u if u > v else v
            low[a] = less if less < low[a] else low[a]
            high[a] = more if more > high[a] else high[a]


@njit(parallel=True, **OPTIONS)
def extremes(x, factors, low, high):
    """Least and largest ``x * factors`` of every row, for several factors.

    Args:
        x: (M, I); factors: (I, A); low, high: (M, A), written.
    """
    for m in prange(x.shape[0]):
        low[m], high[m] = x[m, 0] * factors[0], x[m, 0] * factors[0]
        _widen(x[m], factors, low[m], high[m])


@njit(parallel=True, **OPTIONS)
def codes(x, factors, scale, zero, top, out):
    """``round(x * factors / scale) + zero``, not below 0 and not above ``top``.

    Args:
        x: (M, I); factors: (I,); scale, zero: (M,); out: (M, I) uint8 or float32, written.
    """
    for m in prange(x.shape[0]):
        inverse, offset = np.float32(1) / scale[m], zero[m]
        for i in range(x.shape[1]):
            code = np.rint(x[m, i] * factors[i] * inverse) + offset
            out[m, i] = np.int32(min(max(code, np.float32(0)), top))


@njit(parallel=True, **OPTIONS)
def energies(sums, offsets, step, scale, zero, y, out):
    """``|scale step (sums - zero offsets) - y|^2`` of every row.

    Args:
        sums: (M, O) float32 or int32; y: (M, O); offsets, step: (O,); scale, zero: (M,); out: (M,), written.
    """
    for m in prange(y.shape[0]):
        total = np.float32(0)
        for o in range(y.shape[1]):
            difference = (np.float32(sums[m, o]) - zero[m] * offsets[o]) * step[o] * scale[m] - y[m, o]
            total += difference * difference
        out[m] = total


@njit(parallel=True, **EXACT)
def round_to_int8(weight, factors, group, top, values, step):
    """``quant.twolevel.round_to_int8`` of ``diag(s) weight`` for several factors s; groups go along inputs, loops along outputs, which vectorises.

    Args:
        weight: (I, O); factors: (A, I); top: largest code; values: (A, I, O) int8 and step: (A, O), written.
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
        for i in range(inputs):
            factor, spacing, limit = factors[a, i], scale[i // group], room[i // group]
            for o in range(outputs):
                code = np.rint(weight[i, o] * factor / spacing[o])
                code = code if code < limit[o] else limit[o]
                values[a, i, o] = np.int32(np.rint(code * (spacing[o] / step[a, o])))
