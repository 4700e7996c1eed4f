"""Quantisation the way the published code does it, to measure ours against.

One trajectory per layer whose inputs are all stored, and every candidate of the search as a full
product. The recipe and the low-rank solver are ours.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
from architectures.hooked import hooked
from benchmarks.subjects import block_linears, block_sites, calibration_start
from config import Recipe
from diffusion import Schedule, guided_denoiser, sample_loop
from models import DiT
from quant.balancing.maxima import aggregate, smoothing_factors
from quant.calibration.trajectory import record
from quant.numerics.uniform import fake_quantize
from quant.recipe import act_spec, weight_spec
from quant.weights.low_rank import LowRankWeight, lowrank_quantize
from quant.weights.rounding import WeightQuantizer, nearest_quantizer
from quant.weights.two_level import round_to_int8

IMAGES = 16  # of a calibration trajectory
WEIGHT_BITS = 4
ACT_BITS = 8


@dataclass(frozen=True)
class StoredLayer:
    """A linear, and what the published procedure keeps of it."""

    linear: nn.Linear
    absmax: Tensor  # (steps, I), maxima of the input
    inputs: list[Tensor]  # of every call
    base: LowRankWeight | None  # the weight, where it is quantised before it is smoothed
    balanced: Tensor  # (O, I), the weight whose maxima decide on smoothing factors

    def factors(self, recipe: Recipe, alpha: float) -> Tensor:
        """Compute the smoothing factors (I,) of a migration strength."""
        act_max = aggregate(self.absmax, recipe.balance, recipe.timestep)
        return smoothing_factors(act_max, self.balanced, alpha, config.factor_floor)


@torch.no_grad()
def published_procedure(
    model: DiT,
    recipe: Recipe,
    schedule: Schedule,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Quantise the linears of all blocks at W4A8.

    Returns:
        Each layer's migration strength, and the losses (A,) of all that were tried.
    """
    linears = block_linears(model)
    spec = weight_spec(recipe, WEIGHT_BITS)

    # Weights first, where the recipe quantises before it smooths.
    bases = {}
    if recipe.order == "lowrank-first":
        for name, linear in linears.items():
            bases[name] = branch(linear.weight, recipe, nearest_quantizer(spec))
    absmax = record_maxima(model, schedule)

    alphas = {}
    losses = {}
    for name, linear in linears.items():
        # Sample, and search among the migration strengths.
        inputs = store_inputs(model, name, schedule)
        base = bases.get(name)
        balanced = linear.weight if base is None else base.base.dequantize()
        layer = StoredLayer(linear, absmax[name], inputs, base, balanced)
        losses[name] = torch.stack([alpha_loss(layer, recipe, alpha) for alpha in recipe.alphas])
        alphas[name] = recipe.alphas[int(losses[name].argmin())]

        # Weights last, where the recipe smooths first.
        if base is None:
            s = layer.factors(recipe, alphas[name])
            weight = linear.weight * s
            importance = (absmax[name] / s).square().mean(0)
            quantizer = nearest_quantizer(spec, importance)
            branch(weight, recipe, quantizer).integer_branch(weight)
    return alphas, losses


def branch(weight: Tensor, recipe: Recipe, quantizer: WeightQuantizer) -> LowRankWeight:
    """Quantise a weight with a low-rank branch, by the recipe."""
    rank = config.lowrank_rank(recipe, min(weight.shape))
    return lowrank_quantize(weight, quantizer, rank, recipe.rounds, recipe.keep, "fast")


def record_maxima(model: DiT, schedule: Schedule) -> dict[str, Tensor]:
    """Sample once for the maxima (steps, I) of every layer's input."""
    drive = calibration_start(model, IMAGES).drive(schedule)
    _, absmax = record(model, block_sites(model), drive)
    return absmax


def store_inputs(model: DiT, name: str, schedule: Schedule) -> list[Tensor]:
    """Sample once for the inputs (2N, T, I) of one layer in every step."""
    history = []
    start = calibration_start(model, IMAGES)
    denoise = guided_denoiser(model, start.labels, config.calibration_cfg_scale)
    with hooked(model, [name], lambda _, inputs, __: history.append(inputs)):
        for _ in sample_loop(denoise, schedule, start.x, start.draw):
            pass
    return history


def alpha_loss(layer: StoredLayer, recipe: Recipe, alpha: float) -> Tensor:
    """Compute the loss of one migration strength: mean squared errors of the output, summed."""
    linear, base = layer.linear, layer.base
    act = act_spec(recipe, ACT_BITS)
    s = layer.factors(recipe, alpha)
    if base is None:
        values, step = round_to_int8(linear.weight * s, weight_spec(recipe, WEIGHT_BITS))
    loss = torch.zeros((), dtype=torch.float64)
    for x in layer.inputs:
        expected = F.linear(x, linear.weight, linear.bias)
        q = fake_quantize(x / s, act)
        if base is None:
            output = F.linear(q, values * step[:, None], linear.bias)
        else:
            low_rank = F.linear(F.linear(q, base.right * s), base.left)
            output = F.linear(q, layer.balanced * s) + low_rank + linear.bias
        loss += (output - expected).square().mean().double()
    return loss
