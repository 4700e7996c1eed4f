"""Candidates of the grid search and their errors, compiled for CPUs.

``quant.balancing.candidates`` and ``quant.balancing.losses`` define both. Here, what surrounds the
products is one pass each (``quant.numerics.passes``), and small integers are multiplied on int8.
"""
import numpy as np
import torch
from torch import Tensor

from quant.balancing.candidates import Candidates, rounded
from quant.balancing.losses import Arithmetic, entry_ranges
from quant.integer.cpu import supported
from quant.numerics import passes
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import grouped, scale_and_zero


def fused_rounded(weight: Tensor, factors: Tensor, spec: QuantSpec) -> Candidates:
    """Compiled version of ``rounded``: two-level layouts in a quarter of its time.

    The values of these are a transposed view.

    Raises:
        ValueError: the weight does not divide into groups.
    """
    if spec.convention != "two-level":
        return rounded(weight, factors, spec)
    passes.use_threads(torch.get_num_threads())
    groups, _ = grouped(weight, spec)
    group = groups.shape[-1]
    by_input = weight.T.contiguous()  # (I, O)
    values = torch.empty(len(factors), *by_input.shape, dtype=torch.int8)  # (A, I, O)
    step = torch.empty(len(factors), len(weight))  # (A, O)
    sums = torch.empty_like(step)
    passes.round_to_int8(
        by_input.numpy(), factors.numpy(), group, np.float32(spec.top),
        values.numpy(), step.numpy(), sums.numpy())
    return Candidates(factors, values.transpose(1, 2), step, sums)


def fused_squared_errors(
        x: Tensor, y: Tensor, bias: Tensor, candidates: Candidates, act: QuantSpec) -> Tensor:
    """Compiled version of ``squared_errors``, with the same arguments.

    Codes may differ where a value lies within a rounding error of the middle between two.

    Returns:
        (A,) float64.
    """
    passes.use_threads(torch.get_num_threads())
    inputs = x.flatten(0, 1).numpy()                      # (M, I)
    outputs = y.flatten(0, 1).numpy()                     # (M, O)
    bias = bias.numpy()                                   # (O,)
    inverse = (1 / candidates.factors).numpy()            # (A, I)
    scale, zero = _row_ranges(x, candidates.factors, act)  # (A, M)

    integers = candidates.values.dtype == torch.int8 and supported()
    product = (IntegerProduct if integers else FloatProduct)(candidates, len(inputs), act.top)
    errors = np.empty((len(inverse), len(inputs)), np.float32)  # (A, M)
    for a in range(len(inverse)):
        product.multiply(a, inputs, inverse[a], scale[a], zero[a])
        product.squared_errors(a, scale[a], zero[a], bias, outputs, errors[a])
    return torch.from_numpy(errors.sum(1, dtype=np.float64))


FUSED = Arithmetic(fused_rounded, fused_squared_errors)


class IntegerProduct:
    """uint8 codes times int8 weights; scales and zero points come after the product.

    ``FloatProduct`` is its twin.

    Args:
        candidates: with int8 values, step and sums.
        rows: M, inputs multiplied at a time.
        top: the largest code of an input.
    """

    def __init__(self, candidates: Candidates, rows: int, top: int):
        self._values = candidates.values      # (A, O, I)
        self._step = candidates.step.numpy()  # (A, O)
        self._sums = candidates.sums.numpy()  # (A, O)
        self._top = np.float32(top)
        _, outputs, inputs = candidates.values.shape
        self._codes = torch.empty(rows, inputs, dtype=torch.uint8)
        self._products = torch.empty(rows, outputs, dtype=torch.int32)

    def multiply(
            self, a: int, inputs: np.ndarray, inverse: np.ndarray,
            scale: np.ndarray, zero: np.ndarray) -> None:
        """Quantise inputs (M, I) times inverse factors (I,) and multiply by candidate ``a``."""
        passes.codes(inputs, inverse, scale, zero, self._top, self._codes.numpy())
        torch._int_mm(self._codes, self._values[a].T, out=self._products)

    def squared_errors(
            self, a: int, scale: np.ndarray, zero: np.ndarray, bias: np.ndarray,
            outputs: np.ndarray, out: np.ndarray) -> None:
        """Write the squared errors (M,) of the products against ``outputs`` (M, O) to ``out``."""
        passes.squared_errors(
            self._products.numpy(), self._sums[a], self._step[a], scale, zero,
            bias, outputs, out)


class FloatProduct:
    """Values that codes stand for, times weights as float32; only steps come after the product.

    ``IntegerProduct`` is its twin, with the same arguments and methods.
    """

    def __init__(self, candidates: Candidates, rows: int, top: int):
        count, outputs, inputs = candidates.values.shape
        self._values = candidates.values                               # (A, O, I)
        self._step = _or_ones(candidates.step, (count, outputs))       # (A, O)
        self._columns = _or_ones(candidates.columns, (count, inputs))  # (A, I)
        self._top = np.float32(top)
        self._quantized = torch.empty(rows, inputs)
        self._products = torch.empty(rows, outputs)
        # Scales and zero points are in the quantised inputs already.
        self._scale = np.ones(rows, np.float32)
        self._zero = np.zeros(rows, np.float32)
        self._sums = np.zeros(outputs, np.float32)

    def multiply(
            self, a: int, inputs: np.ndarray, inverse: np.ndarray,
            scale: np.ndarray, zero: np.ndarray) -> None:
        passes.fake_quantized(
            inputs, inverse, scale, zero, self._top, self._columns[a], self._quantized.numpy())
        torch.mm(self._quantized, self._values[a].T.float(), out=self._products)

    def squared_errors(
            self, a: int, scale: np.ndarray, zero: np.ndarray, bias: np.ndarray,
            outputs: np.ndarray, out: np.ndarray) -> None:
        passes.squared_errors(
            self._products.numpy(), self._sums, self._step[a], self._scale, self._zero,
            bias, outputs, out)


def _row_ranges(x: Tensor, factors: Tensor, act: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    """Compute scale and zero point of every row of ``x / s``.

    Args:
        x: (B, R, I), with M = B R rows.
        factors: (A, I).
        act: of granularity ``token``, or ``image`` for one range per entry of x.

    Returns:
        Scale and zero point, (A, M) each.
    """
    if act.granularity == "token":
        rows = x.flatten(0, 1)
        low = torch.empty(len(factors), len(rows))
        high = torch.empty_like(low)
        passes.extremes(rows.numpy(), (1 / factors).numpy(), low.numpy(), high.numpy())
        scale, zero = scale_and_zero(low, high, act)
    else:
        scale, zero = entry_ranges(x, factors, act)  # (A, B, 1, 1)
        scale = scale.flatten(1).repeat_interleave(x.shape[1], 1)
        zero = zero.flatten(1).repeat_interleave(x.shape[1], 1)
    return scale.numpy(), zero.numpy()


def _or_ones(values: Tensor | None, shape: tuple[int, int]) -> np.ndarray:
    """Turn a tensor into an array; None into float32 ones of this shape."""
    return np.ones(shape, np.float32) if values is None else values.numpy()
