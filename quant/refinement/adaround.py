"""AdaRound with learned activation steps, unit by unit.

After Nagel et al. (2020) and BRECQ (Li et al., 2021), as PTQ4DiT and TFMQ-DM use them. Every weight
is rounded down or up, and which is learned. A unit, such as a block, gets what the quantised units
before it give, and has to give what the float unit gives to the float inputs. Rounding is relaxed
to h(V) in [0, 1] and pushed to 0 or 1 as the iterations go. The steps of static activation
quantisers may be learned beside it.
"""
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

import config
from architectures.registry import architecture_of
from architectures.sites import Call
from architectures.units import units
from config import Recipe
from quant.activations.attention import Operands
from quant.activations.quantisers import Activation
from quant.install import install
from quant.layers.quantised import QuantizedLayer
from quant.numerics.spec import OFF_BITS
from quant.refinement.soft_unit import SoftUnit
from quant.refinement.unit_chain import UnitChain

Layers = dict[str, QuantizedLayer]


def rounding_loss(h: Tensor, beta: float) -> Tensor:
    """Compute ``sum (1 - |2h - 1|^beta)``: 0 where every h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def beta_at(iteration: int, iterations: int) -> float | None:
    """Return the exponent of ``rounding_loss``.

    None while warming up, then linearly from the first to the second of ``config.rounding_beta``.
    """
    warm = config.rounding_warmup * iterations
    if iteration < warm:
        return None
    first, last = config.rounding_beta
    return last + (first - last) * (1 - (iteration - warm) / (iterations - warm))


def reconstruct(
    model: nn.Module, layers: Layers, operands: dict[str, Operands], inputs: Call, recipe: Recipe
) -> tuple[Layers, dict[str, Operands]]:
    """Learn the rounding of every layer in the recipe's units.

    Args:
        model: float, left as it was.
        layers: rounded to the nearest, of floating scales and no low-rank branch. Those outside
            the units are used and not learned.
        operands: of the attentions; may be empty.
        inputs: a call of the model, of images drawn from the trajectory.
        recipe: says what the units are, how many iterations each gets, the learning rate of the
            rounding, and whether activation steps are learned beside it. The published 20 000
            iterations are for blocks of DiT-XL/2; fewer need a higher rate.

    Returns:
        Layers and operands.
    """
    if recipe.learned == "rounding":
        bare = {name: _with_float_input(layer) for name, layer in layers.items()}
        learned, _ = _reconstruct(model, bare, {}, inputs, recipe)
        layers = {name: replace(layer, act=layers[name].act) for name, layer in learned.items()}
        return layers, operands
    return _reconstruct(model, layers, operands, inputs, recipe)


def _with_float_input(layer: QuantizedLayer) -> QuantizedLayer:
    """Leave the layer's input as it is."""
    return replace(layer, act=Activation(replace(layer.act.spec, bits=OFF_BITS)))


def _reconstruct(
    model: nn.Module, layers: Layers, operands: dict[str, Operands], inputs: Call, recipe: Recipe
) -> tuple[Layers, dict[str, Operands]]:
    layers, operands = dict(layers), dict(operands)
    quantised = install(deepcopy(model), layers, operands=operands).requires_grad_(False)
    float_chain, quantised_chain = UnitChain(model, inputs), UnitChain(quantised, inputs)
    generator = torch.Generator().manual_seed(0)
    chosen = [unit for unit in units(architecture_of(model), model, recipe.units)
              if not layers.keys().isdisjoint(unit.linears)]
    with tqdm(total=recipe.iterations * len(chosen), desc="rounding", unit="step") as bar:
        for unit in chosen:
            # What the float unit gives, on the float model's inputs.
            float_chain.enter(unit)
            target = float_chain.outputs(unit)
            # What the unit gives on the outputs of the quantised units before it.
            quantised_chain.enter(unit)
            soft = SoftUnit(model, quantised, unit, layers, operands)
            run = partial(quantised_chain.run, unit)
            train(soft, run, target, recipe, generator, bar)
            soft.harden(layers, operands)
            float_chain.leave(unit, target)
            quantised_chain.leave(unit, quantised_chain.outputs(unit))
    return layers, operands


def reconstruction_error(outputs: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Tensor:
    """Sum the squared errors of several outputs (n, C, ...), along C; average all else."""
    return sum((output - expected).square().sum(1).mean()
               for output, expected in zip(outputs, target))


@torch.enable_grad()
def train(
    soft: SoftUnit,
    run: Callable[[Tensor], tuple[Tensor, ...]],
    target: tuple[Tensor, ...],
    recipe: Recipe,
    generator: torch.Generator,
    bar: tqdm,
) -> None:
    """Train the rounding and the steps of a soft unit to give ``target``, of P entries each.

    Args:
        run: computes its outputs for some of the P images, (n,) int64.
        generator: draws the images of every iteration.
    """
    linears = list(soft.linears.values())
    rounding = torch.optim.Adam(
        [linear.v for linear in linears], lr=recipe.rounding_rate, fused=True)
    steps = Steps(soft.steps())
    images = len(target[0])
    for iteration in range(recipe.iterations):
        chosen = torch.randint(images, (config.reconstruction_batch,), generator=generator)
        chosen = chosen.to(target[0].device)
        expected = tuple(values[chosen] for values in target)
        loss = reconstruction_error(run(chosen), expected)
        beta = beta_at(iteration, recipe.iterations)
        if beta is not None:
            penalty = sum(rounding_loss(linear.h, beta) for linear in linears)
            loss = loss + config.rounding_weight * penalty
        rounding.zero_grad()
        steps.zero_grad()
        loss.backward()
        rounding.step()
        steps.step(iteration / recipe.iterations)
        bar.update()


class Steps:
    """The learned activation steps of a block; their learning rate falls along a cosine."""

    def __init__(self, scales: list[Tensor]):
        self._scales = scales
        self._optimizer = torch.optim.Adam(scales, lr=config.step_rate) if scales else None
        # Adam moves small steps as far as large ones, if need be through zero.
        self._floors = [0.1 * scale.min().item() for scale in scales]

    def zero_grad(self) -> None:
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    def step(self, progress: float) -> None:
        """Make one step; ``progress`` is the share of the iterations that are done."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = config.step_rate * 0.5 * (1 + math.cos(math.pi * progress))
        self._optimizer.step()
        for scale, floor in zip(self._scales, self._floors):
            scale.data.clamp_(min=floor)
