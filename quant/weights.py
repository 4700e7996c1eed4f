"""How a weight becomes codes: the parts of a recipe that concern weights, put together."""
from collections.abc import Callable
from functools import partial

from torch import Tensor

from quant.gptq import gptq_quantize
from quant.quantizer import Grid, Quantized, QuantSpec, affine_grid, grouped, quantize
from quant.ranges import RANGES, quantize_range
from quant.twolevel import find_steps, quantize_two_level, two_level_grid

Quantizer = Callable[[Tensor], Quantized]


def nearest_quantizer(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, choice: str = "minmax") -> Quantizer:
    """Rounds weights (O, I) that are near ``weight`` to the nearest codes.

    Args:
        importance: (I,) weights of the squared errors by which two-level scales are chosen; None for all the same.
        choice: of floating ranges, a key of ``quant.ranges.RANGES``.
    """
    if spec.convention == "two-level":
        return partial(quantize_two_level, spec=spec, importance=importance, step=find_steps(weight, spec, importance))
    return partial(quantize, spec=spec) if choice == "minmax" else partial(quantize_range, spec=spec, choice=choice)


def gptq_quantizer(weight: Tensor, spec: QuantSpec, hessian: Tensor, choice: str = "minmax") -> Quantizer:
    """Rounds weights (O, I) that are near ``weight`` by GPTQ; ``hessian`` (I, I) is that of its inputs, ``choice`` as above."""
    step = None
    if spec.convention == "two-level":
        importance = hessian.diagonal()
        step, cost = find_steps(weight, spec, importance), importance.view(grouped(weight, spec)[0].shape[1:])

        def grid(groups: Tensor, index: slice) -> Grid:
            return two_level_grid(groups, step, cost[index], spec)
    else:
        def grid(groups: Tensor, index: slice) -> Grid:
            return affine_grid(*RANGES[choice](groups, (-1,), spec), spec)
    return partial(gptq_quantize, hessian=hessian, spec=spec, grid=grid, step=step)


def quantize_weight(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Quantized:
    """Round a weight (O, I) to the nearest codes; for ``importance`` see ``nearest_quantizer``.

    Raises:
        ValueError: the weight holds NaN or infinity, or does not divide into groups.
    """
    return nearest_quantizer(weight, spec, importance)(weight)
