"""The part that rounds every weight, in the order that a recipe says.

``SmoothFirst`` quantises ``W diag(s)``. ``LowRankFirst``, the published order, quantises W before
the trajectory is seen and multiplies what came out by s.
"""
from collections.abc import Callable

import torch
from torch import Tensor

import config
from architectures.sites import Site
from config import Recipe
from quant.calibration.observers import SecondMoment
from quant.calibration.trajectory import WeightOf, joint_weight
from quant.calibration.watch import Watch
from quant.numerics.smoothing import Smoothing
from quant.numerics.spec import QuantSpec
from quant.recipe import uses_moments, weight_spec
from quant.weights.low_rank import LowRankWeight, lowrank_quantize, without_branch
from quant.weights.rounding import WeightQuantizer, gptq_quantizer, nearest_quantizer

# The quantised weight of every linear of a site, by name.
Weights = dict[str, LowRankWeight]


class SmoothFirst:
    """Quantises every weight, multiplied by its smoothing factors.

    Args:
        float_weight: of every linear.
        maxima: per site, (steps, I), of its inputs.
        svd: the low-rank solver, a key of ``quant.weights.low_rank.SOLVERS``.
    """

    def __init__(
        self, float_weight: WeightOf, recipe: Recipe, bits: int, maxima: dict[str, Tensor],
        svd: str,
    ):
        self._float_weight = float_weight
        self._recipe = recipe
        self._bits = bits
        self._maxima = maxima
        self._svd = svd
        self._moments: dict[str, SecondMoment] = {}
        self._given: dict[str, Tensor] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for the second moment of the float model's inputs, if the recipe looks at it."""
        if uses_moments(self._recipe) and self._recipe.hessian == "float":
            steps = len(self._maxima[site.name])
            self._moments[site.name] = watch.add(
                site.linears[0], SecondMoment, lambda: SecondMoment(steps))

    def take_moments(self, moments: dict[str, Tensor]) -> None:
        """Take over second moments (I, I) of sites, of inputs as the products see them."""
        self._given = moments

    def weight_of(self, site: Site) -> Tensor:
        """Return the weight (O, I) whose magnitudes the balance measures."""
        return joint_weight(site, self._float_weight)

    def shared(self, linear: str) -> None:
        """Return the quantised weight that all candidates of a search share: there is none."""
        return None

    def finish(self, site: Site, smoothing: Smoothing, group: int | None) -> Weights:
        """Quantise the weights of a site, with groups of the given size (None: the recipe's)."""
        spec = weight_spec(self._recipe, self._bits, group)
        moment = self._moment(site, smoothing)
        metric = moment if self._recipe.metric == "output" else None
        quantizer = self._quantizer(site, smoothing, spec, moment)
        weights = {}
        for name in site.linears:
            weight = smoothing.of_weight(self._float_weight(name))
            approximation = lowrank_quantize(
                weight, quantizer, config.lowrank_rank(self._recipe, min(weight.shape)),
                self._recipe.rounds, self._recipe.keep, self._svd, metric)
            weights[name] = approximation.integer_branch(weight, metric)
        return weights

    def draft(self, site: Site, smoothing: Smoothing, group: int | None) -> Weights:
        """Round the weights of a site to the nearest, for a quick look at a group size."""
        spec = weight_spec(self._recipe, self._bits, group)
        quantizer = self._nearest(site, smoothing, spec)
        weights = {}
        for name in site.linears:
            weight = smoothing.of_weight(self._float_weight(name))
            weights[name] = without_branch(quantizer(weight, None))
        return weights

    def _moment(self, site: Site, smoothing: Smoothing) -> Tensor | None:
        if site.name in self._given:
            return self._given[site.name]
        if site.name not in self._moments:
            return None
        return smoothing.of_moment(self._moments[site.name].value)

    def _quantizer(
        self, site: Site, smoothing: Smoothing, spec: QuantSpec, moment: Tensor | None
    ) -> WeightQuantizer:
        if self._recipe.weight == "gptq":
            return gptq_quantizer(spec, moment, self._recipe.weight_range)
        return self._nearest(site, smoothing, spec)

    def _nearest(self, site: Site, smoothing: Smoothing, spec: QuantSpec) -> WeightQuantizer:
        # Two-level scales minimise an error weighted by the mean square of the inputs' maxima.
        importance = None
        if smoothing.factors is not None and site.name in self._maxima:
            importance = (self._maxima[site.name] / smoothing.factors).square().mean(0)
        return nearest_quantizer(spec, importance, self._recipe.weight_range)


class LowRankFirst:
    """Quantises every weight as it is, and multiplies scales and branch by the factors later.

    Args:
        progress: shows a bar around sites.
    """

    def __init__(
        self,
        float_weight: WeightOf,
        sites: list[Site],
        recipe: Recipe,
        bits: int,
        svd: str,
        progress: Callable[[list[Site]], list[Site]],
    ):
        self._bases: Weights = {}
        for site in progress(sites):
            for name in site.linears:
                weight = float_weight(name)
                quantizer = nearest_quantizer(weight_spec(recipe, bits), None, recipe.weight_range)
                self._bases[name] = lowrank_quantize(
                    weight, quantizer, config.lowrank_rank(recipe, min(weight.shape)),
                    recipe.rounds, recipe.keep, svd)

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for nothing."""

    def weight_of(self, site: Site) -> Tensor:
        """Return the quantised weight (O, I), without its branch."""
        weights = [self._bases[name].base.dequantize() for name in site.linears]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def shared(self, linear: str) -> Tensor:
        """Return the quantised weight (O, I), branch included, that all candidates share."""
        return self._bases[linear].dense()

    def finish(self, site: Site, smoothing: Smoothing, group: int | None) -> Weights:
        """Multiply the input channels of a site's weights by its factors."""
        return {name: _scale_columns(self._bases[name], smoothing) for name in site.linears}


def _scale_columns(weight: LowRankWeight, smoothing: Smoothing) -> LowRankWeight:
    if smoothing.factors is None:
        return weight
    base = weight.base.scale_columns(smoothing.factors)
    return LowRankWeight(base, weight.left, smoothing.of_weight(weight.right))
