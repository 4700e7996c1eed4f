"""A float DiT and a recipe in, quantised layers out: the order in which the steps of a method happen."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

import config
from config import Recipe
from diffusion import Schedule
from quant.calibrate import Trajectory, record, replay
from quant.linear import QuantizedLayer, block_linears, modulation_linears
from quant.lowrank import LowRankWeight, lowrank_quantize, plain
from quant.quantizer import OFF_BITS, QuantSpec, grouped
from quant.search import AlphaSearch
from quant.smoothing import aggregate, check_step, smoothing_factors
from quant.twolevel import quantize_weight


@dataclass(frozen=True)
class Start:
    """What a calibration trajectory starts from: ``x`` (N, C, H, W) noise, ``draw`` for the steps, ``labels`` (N,)."""

    x: Tensor
    draw: Callable[[], Tensor]
    labels: Tensor


@dataclass
class Result:
    """Quantised layers by name, and what was found on the way (empty where a recipe skips the step).

    Attributes:
        absmax: per layer (steps, I), maxima of the input at each step.
        alphas: per layer, the migration strength chosen.
        losses: per layer (A,) float64, the loss of every candidate.
    """

    layers: dict[str, QuantizedLayer]
    absmax: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)


def weight_spec(recipe: Recipe, bits: int) -> QuantSpec:
    convention = "two-level" if recipe.weight_scales == "two-level" else recipe.convention
    return QuantSpec(bits, recipe.weight_granularity, recipe.weight_group, convention)


def adaln_spec(bits: int, columns: int) -> QuantSpec:
    """Of a modulation with ``columns`` inputs: one group per output channel, integers of at most 127."""
    return QuantSpec(bits, "group", columns, "two-level")


def act_spec(recipe: Recipe, bits: int) -> QuantSpec:
    return QuantSpec(bits, recipe.act_granularity, convention=recipe.convention)


@torch.no_grad()
def quantize_model(model: nn.Module, recipe: Recipe, weight_bits: int, act_bits: int, schedule: Schedule, start: Start,
                   svd: str = "fast") -> Result:
    """Quantise the linears of every block, and its adaLN modulation if the recipe says so. The model is left as it was.

    Args:
        model: a float ``DiT`` in eval mode on any device.
        svd: the low-rank solver, a key of ``quant.lowrank.SOLVERS``.

    Raises:
        ValueError: the model gives non-finite values, or a group size does not fit a layer.
    """
    linears = block_linears(model)
    spec, act = weight_spec(recipe, weight_bits), act_spec(recipe, act_bits)
    for linear in linears.values():
        grouped(linear.weight, spec)  # a group size that does not fit is found before any work is done

    def lowrank(weight: Tensor, importance: Tensor | None) -> LowRankWeight:
        rank = config.lowrank_rank(recipe, min(weight.shape))
        found = lowrank_quantize(weight, spec, rank, recipe.rounds, recipe.keep, svd, importance)
        return found if recipe.order == "lowrank-first" else found.integer_branch(weight)

    def lowrank_all(factors: dict[str, Tensor]) -> dict[str, LowRankWeight]:
        """Of the weights scaled by the factors that are given; errors count by how large inputs get, maxima squared over the steps."""
        found = {}
        for name, linear in tqdm(linears.items(), desc="weights", unit="layer"):
            s = factors.get(name)
            found[name] = lowrank(linear.weight, None) if s is None else lowrank(linear.weight * s, (absmax[name] / s).square().mean(0))
        return found

    modulation = {}
    if recipe.adaln_bits != OFF_BITS:
        modulation = {name: QuantizedLayer(plain(quantize_weight(linear.weight, adaln_spec(recipe.adaln_bits, linear.in_features))), None)
                      for name, linear in modulation_linears(model).items()}
    if recipe.balance == "none":
        weights = lowrank_all({})
        return Result({name: QuantizedLayer(weight, None) for name, weight in weights.items()} | modulation)

    check_step(recipe.timestep, len(schedule))
    bases = lowrank_all({}) if recipe.order == "lowrank-first" else {}
    trajectory, absmax = record(model, linears, schedule, start.labels, config.calibration_cfg_scale, start.x, start.draw)
    candidates = {}
    for name, linear in linears.items():
        balanced = bases[name].weight.dequantize() if name in bases else linear.weight
        act_max = aggregate(absmax[name], recipe.balance, recipe.timestep)
        candidates[name] = torch.stack([smoothing_factors(act_max, balanced, a, config.factor_floor) for a in recipe.alphas])
    chosen, losses = _search(model, linears, trajectory, candidates, spec, act, bases)

    factors = {name: candidates[name][index] for name, index in chosen.items()}
    if bases:
        weights = {name: _scale(base, factors[name]) for name, base in bases.items()}
    else:
        weights = lowrank_all(factors)
    layers = {name: QuantizedLayer(weight, factors[name]) for name, weight in weights.items()}
    return Result(layers | modulation, absmax, {name: recipe.alphas[index] for name, index in chosen.items()}, losses)


def _search(model: nn.Module, linears: dict[str, nn.Linear], trajectory: Trajectory, candidates: dict[str, Tensor], spec: QuantSpec,
            act: QuantSpec, bases: dict[str, LowRankWeight]) -> tuple[dict[str, int], dict[str, Tensor]]:
    if all(len(factors) == 1 for factors in candidates.values()):
        return dict.fromkeys(candidates, 0), {}
    searches = {name: AlphaSearch(linear.weight, candidates[name], spec, act, bases[name].dense() if name in bases else None)
                for name, linear in linears.items()}
    replay(model, linears, trajectory, searches, config.replay_tokens, "search")
    return {name: search.best() for name, search in searches.items()}, {name: search.loss for name, search in searches.items()}


def _scale(base: LowRankWeight, factors: Tensor) -> LowRankWeight:
    return LowRankWeight(base.weight.scale_columns(factors), base.left, base.right * factors)
