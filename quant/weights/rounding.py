"""How a weight becomes codes: the parts of a recipe that concern weights, put together."""
from collections.abc import Callable

from torch import Tensor

from quant.numerics.ranges import Affine, best_range, quantize_range
from quant.numerics.uniform import Grid, Quantized, QuantSpec, affine_grid, grouped, quantize
from quant.weights.gptq import BLOCK, DAMPING, gptq_quantize, inverse_factor
from quant.weights.two_level import find_steps, quantize_two_level, two_level_grid

WeightQuantizer = Callable[[Tensor, Quantized | None], Quantized]  # the second: an earlier result of a similar weight, whose steps will do


def nearest_quantizer(spec: QuantSpec, importance: Tensor | None = None, choice: str = "minmax") -> WeightQuantizer:
    """Rounds weights (O, I) to the nearest codes.

    Args:
        importance: (I,) weights of the squared errors by which two-level scales are chosen; None for all the same.
        choice: of floating ranges, a key of ``quant.numerics.ranges.RANGES``.
    """
    def two_level(weight: Tensor, previous: Quantized | None = None) -> Quantized:
        return quantize_two_level(weight, spec, importance, find_steps(weight, spec, importance) if previous is None else previous.step)

    def affine(weight: Tensor, previous: Quantized | None = None) -> Quantized:
        return quantize(weight, spec) if choice == "minmax" else quantize_range(weight, spec, choice)
    return two_level if spec.convention == "two-level" else affine


def gptq_quantizer(spec: QuantSpec, hessian: Tensor, choice: str = "minmax", block: int = BLOCK) -> WeightQuantizer:
    """Rounds weights (O, I) by GPTQ; ``hessian`` (I, I) is that of their inputs, ``choice`` as above, ``block`` as in ``quant.weights.gptq``."""
    factor, importance = inverse_factor(hessian, DAMPING), hessian.diagonal()
    dead = importance == 0

    def two_level(weight: Tensor, previous: Quantized | None = None) -> Quantized:
        step = find_steps(weight, spec, importance) if previous is None else previous.step
        cost = importance.view(grouped(weight, spec)[0].shape[1:])

        def grid(groups: Tensor, index: slice) -> Grid:
            return two_level_grid(groups, step, cost[index], spec)
        return gptq_quantize(weight.masked_fill(dead, 0.0), factor, spec, grid, step, block)

    def affine(weight: Tensor, previous: Quantized | None = None) -> Quantized:
        def grid(groups: Tensor, index: slice) -> Grid:
            return affine_grid(*best_range(groups, (-1,), Affine(spec), choice), spec)
        return gptq_quantize(weight.masked_fill(dead, 0.0), factor, spec, grid, None, block)
    return two_level if spec.convention == "two-level" else affine


def quantize_weight(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Quantized:
    """Round a weight (O, I) to the nearest codes; for ``importance`` see ``nearest_quantizer``.

    Raises:
        ValueError: the weight holds NaN or infinity, or does not divide into groups.
    """
    return nearest_quantizer(spec, importance)(weight)
