"""One pass each over rows of float32, side by side on the processor's cores, compiled by numba when first called (and kept in __pycache__)."""
import numpy as np
from numba import njit, prange

RELAXED = {"nnan", "ninf", "nsz", "reassoc", "contract"}  # lets sums be vectors; what comes in must be finite
OPTIONS = {"cache": True, "fastmath": RELAXED, "error_model": "numpy"}


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
