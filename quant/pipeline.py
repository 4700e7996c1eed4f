"""A float DiT and a recipe in, quantised layers out: the order in which the steps of a method happen."""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import config
from architectures.dit import modulation_linears, scope_linears
from config import Recipe
from diffusion import Schedule
from quant.activations.attention import Operands
from quant.balancing.maxima import check_step
from quant.calibration.trajectory import record
from quant.evidence import Evidence
from quant.layers.quantised import QuantizedLayer
from quant.numerics.tokens import matrix
from quant.numerics.uniform import OFF_BITS, grouped
from quant.recipe import adaln_spec, check_recipe, weight_spec
from quant.refinement import evolution as allocate
from quant.refinement.adaround import reconstruct
from quant.refinement.evolution import Objective
from quant.weights.low_rank import LowRankWeight, without_branch
from quant.weights.rounding import quantize_weight


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
        operands: per attention, quantisers of its operands.
        absmax: per layer (steps, I), maxima of the input at each step.
        alphas: per layer, the migration strength chosen.
        losses: per layer (A,) float64, the loss of every candidate.
        groups: per layer, the group size chosen; ``evolution`` tells how.
    """

    layers: dict[str, QuantizedLayer]
    operands: dict[str, Operands] = field(default_factory=dict)
    absmax: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    evolution: tuple[allocate.Round, ...] = ()


@torch.no_grad()
def quantize_model(model: nn.Module, recipe: Recipe, weight_bits: int, act_bits: int, schedule: Schedule, start: Start,
                   svd: str = "fast", judge: Objective | None = None, history: Path | None = None) -> Result:
    """Quantise what the recipe's scope says, and the adaLN modulation if the recipe says so. The model is left as it was.

    Args:
        model: a float ``DiT`` in eval mode on any device.
        svd: the low-rank solver, a key of ``quant.weights.low_rank.SOLVERS``.
        judge: the loss of a quantised model, by which group sizes are chosen.
        history: a file that keeps what that search found, so that it can go on after an interruption.

    Raises:
        ValueError: parts of the recipe do not go together, the model gives non-finite values, or a group size does not fit a layer.
    """
    check_recipe(recipe, act_bits)
    linears = scope_linears(model, recipe.scope)
    for linear in linears.values():
        grouped(matrix(linear), weight_spec(recipe, weight_bits))  # a group size that does not fit is found before any work is done
    found = Evidence(model, recipe, weight_bits, act_bits, linears, svd)
    bases = found.weights({}, {}) if recipe.order == "lowrank-first" else {}
    if found.needs_trajectory:
        check_step(recipe.timestep, len(schedule))
        found.trajectory, found.absmax = record(model, linears, schedule, start.labels, config.calibration_cfg_scale, start.x, start.draw)
        found.observe(bases)

    groups, evolution = {}, ()
    if recipe.group_sizes:
        groups, evolution = found.allocate(judge, history)
    weights = {name: _scale(base, found.smooth.get(name)) for name, base in bases.items()} if bases else found.weights(found.smooth, groups)
    layers, operands = found.layers(weights, groups), found.operands()
    if recipe.weight == "adaround":
        layers, operands = reconstruct(model, layers, operands, found.inputs(), recipe.iterations, recipe.rounding_rate)
    if recipe.adaln_bits != OFF_BITS:
        layers |= {name: QuantizedLayer(without_branch(quantize_weight(linear.weight, adaln_spec(recipe.adaln_bits, linear.in_features))), None)
                   for name, linear in modulation_linears(model).items()}
    return Result(layers, operands, found.absmax, found.alphas, found.losses, groups, evolution)


def _scale(base: LowRankWeight, factors: Tensor | None) -> LowRankWeight:
    return base if factors is None else LowRankWeight(base.base.scale_columns(factors), base.left, base.right * factors)
