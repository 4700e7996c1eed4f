"""How a weight becomes codes: the parts of a recipe that concern weights, put together."""
from collections.abc import Callable

from torch import Tensor

from quant.numerics.ranges import Affine, best_range, quantize_range
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import Grid, Quantized, affine_grid, grouped, quantize
from quant.weights.gptq import BLOCK_CHANNELS, GPTQ_DAMPING, gptq_quantize, inverse_factor
from quant.weights.two_level import find_steps, quantize_two_level, two_level_grid

# A function that turns a weight (O, I) into codes. Its second argument is None, or the result for a
# similar weight, whose two-level steps will do. It is a closure over all that a recipe decides and
# has seen; `quant.numerics.ranges.RangedQuantizer` is the formula of one range inside it.
WeightQuantizer = Callable[[Tensor, Quantized | None], Quantized]


def nearest_quantizer(
    spec: QuantSpec, importance: Tensor | None = None, choice: str = "minmax"
) -> WeightQuantizer:
    """Make the function that rounds weights (O, I) to the nearest codes.

    Args:
        importance: (I,) weights of the squared errors by which two-level scales are chosen; None
            for all the same.
        choice: how floating ranges are chosen, a key of ``quant.numerics.ranges.RANGES``.
    """
    def two_level(weight: Tensor, previous: Quantized | None = None) -> Quantized:
        step = _steps(weight, spec, importance, previous)
        return quantize_two_level(weight, spec, importance, step)

    def affine(weight: Tensor, previous: Quantized | None = None) -> Quantized:
        if choice == "minmax":
            return quantize(weight, spec)
        return quantize_range(weight, spec, choice)

    return two_level if spec.convention == "two-level" else affine


def gptq_quantizer(
    spec: QuantSpec, hessian: Tensor, choice: str = "minmax", block: int = BLOCK_CHANNELS
) -> WeightQuantizer:
    """Make the function that rounds weights (O, I) by GPTQ.

    Args:
        hessian: (I, I), ``X^T X`` of the weights' inputs X, or any multiple of it.
        choice: how floating ranges are chosen, a key of ``quant.numerics.ranges.RANGES``.
        block: as in ``quant.weights.gptq.gptq_quantize``.
    """
    factor = inverse_factor(hessian, GPTQ_DAMPING)
    importance = hessian.diagonal()
    dead = importance == 0

    def two_level(weight: Tensor, previous: Quantized | None = None) -> Quantized:
        step = _steps(weight, spec, importance, previous)
        groups, _ = grouped(weight, spec)
        cost = importance.view(groups.shape[1:])  # (G, g)

        def make_grid(groups: Tensor, numbers: slice) -> Grid:
            return two_level_grid(groups, step, cost[numbers], spec)

        live = weight.masked_fill(dead, 0.0)
        return gptq_quantize(live, factor, spec, make_grid, step, block)

    def affine(weight: Tensor, previous: Quantized | None = None) -> Quantized:
        def make_grid(groups: Tensor, numbers: slice) -> Grid:
            scale, zero = best_range(groups, (-1,), Affine(spec), choice)
            return affine_grid(scale, zero, spec)

        live = weight.masked_fill(dead, 0.0)
        return gptq_quantize(live, factor, spec, make_grid, None, block)

    return two_level if spec.convention == "two-level" else affine


def _steps(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None, previous: Quantized | None
) -> Tensor:
    """Take a previous result's two-level steps (O, 1), or search the weight's own."""
    return find_steps(weight, spec, importance) if previous is None else previous.step


def quantize_weight(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Quantized:
    """Round a weight (O, I) to the nearest codes; for ``importance`` see ``nearest_quantizer``.

    Raises:
        ValueError: the weight holds NaN or infinity, or does not divide into groups.
    """
    return nearest_quantizer(spec, importance)(weight)
