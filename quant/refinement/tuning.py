"""Tuning from end to end: the codes and branches of all layers learn what the float model gives.

Ours. Every other step of a recipe makes the error of a layer's own output small, which says little
of what the model gives in the end. Here nothing but the model's output counts: codes move to a
neighbour where that helps, and scales stay what they are.
"""
import math
from copy import deepcopy

import torch
from torch import Tensor, nn
from tqdm import tqdm

import config
from architectures.sites import Call
from architectures.tracing import tensors_of
from quant.calibration.trajectory import Trajectory
from quant.install import install, put_linear
from quant.layers.quantised import QuantizedLayer
from quant.refinement.tuned_linear import TunedLinear

Layers = dict[str, QuantizedLayer]

# Added to an error, as a share of the signal, so that an error of zero has a logarithm.
LEAST_ERROR = 1e-12

# Batches on which what was learned has to be better than what it started from.
JUDGED_BATCHES = 8

# Adam's memory of gradients and of their squares.
BETAS = (0.9, 0.95)


def tune(model: nn.Module, layers: Layers, trajectory: Trajectory, iterations: int) -> Layers:
    """Learn codes and branches of all layers that have two-level scales; others stay.

    Args:
        model: float, left as it was.
        layers: of the whole model, with dynamic ranges.
        trajectory: calls of the model, of whose images every iteration draws some.

    Returns:
        Layers of the same scales; ``layers`` itself if images of the trajectory gain nothing.

    Raises:
        ValueError: the calls differ in more than their images.
    """
    quantised, tuned = soft_copy(model, layers)
    optimizer = optimizer_of(list(tuned.values()))
    generator = torch.Generator().manual_seed(0)
    with tqdm(range(iterations), desc="tuning", unit="step") as bar:
        for iteration in bar:
            call = trajectory.take(draw(trajectory, generator))
            set_rates(optimizer, iteration / iterations)
            loss = step(model, quantised, call, optimizer)
            bar.set_postfix_str(f"{-loss:.1f} dB", refresh=False)
    learned = layers | {name: linear.harden() for name, linear in tuned.items()}
    judges = [trajectory.take(draw(trajectory, generator)) for _ in range(JUDGED_BATCHES)]
    return min(layers, learned, key=lambda found: loss_of(model, found, judges))


def soft_copy(model: nn.Module, layers: Layers) -> tuple[nn.Module, dict[str, TunedLinear]]:
    """Copy the model with its quantised layers, those of two-level scales ready to learn."""
    quantised = install(deepcopy(model), dict(layers)).requires_grad_(False)
    tuned = {name: TunedLinear(layer, layer.bias(model.get_submodule(name).bias))
             for name, layer in layers.items() if can_learn(layer)}
    for name, linear in tuned.items():
        put_linear(quantised, name, linear)
    return quantised, tuned


def can_learn(layer: QuantizedLayer) -> bool:
    """Tell whether a layer has codes to learn; one of quantised weights alone stays as it is."""
    return layer.act is not None and layer.weight.base.step is not None


def draw(trajectory: Trajectory, generator: torch.Generator) -> Tensor:
    """Draw images of a trajectory, (B, 2) int64: of each its step and its number there."""
    count = config.tuning_batch
    steps = torch.randint(len(trajectory), (count,), generator=generator)
    images = torch.randint(trajectory.images, (count,), generator=generator)
    return torch.stack([steps, images], 1)


@torch.enable_grad()
def step(
    model: nn.Module, quantised: nn.Module, call: Call, optimizer: torch.optim.Optimizer
) -> float:
    """Make one step; return the loss, in dB."""
    with torch.no_grad():
        target = tensors_of(model(**call))
    loss = noise_to_signal_db(tensors_of(quantised(**call)), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def loss_of(model: nn.Module, layers: Layers, calls: list[Call]) -> float:
    """Compute the loss of layers as they will be saved, in dB, over all calls."""
    quantised = install(deepcopy(model), dict(layers))
    losses = [noise_to_signal_db(tensors_of(quantised(**call)), tensors_of(model(**call)))
              for call in calls]
    return torch.stack(losses).mean().item()


def noise_to_signal_db(outputs: list[Tensor], target: list[Tensor]) -> Tensor:
    """Average minus the SQNR in dB of every entry, such as an image, of outputs (n, ...).

    A logarithm makes timesteps count alike, however far their errors are apart.
    """
    ratios = []
    for output, expected in zip(outputs, target, strict=True):
        signal = expected.flatten(1).square().sum(1)
        error = (output - expected).flatten(1).square().sum(1)
        ratios.append((error + LEAST_ERROR * signal).log10() - signal.log10())
    return 10 * torch.cat(ratios).mean()


def optimizer_of(linears: list[TunedLinear]) -> torch.optim.Optimizer:
    """Make the optimiser: codes move in units of a code, a branch in units of its mean size."""
    groups = [{"params": [linear.signed for linear in linears], "rate": config.tuning_rate}]
    groups += [
        {"params": [linear.left], "rate": config.tuning_rate * linear.left.abs().mean().item()}
        for linear in linears if linear.left.numel()]
    return torch.optim.Adam(groups, config.tuning_rate, BETAS, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Let the learning rates fall along a cosine; ``progress`` is the share that is done."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * progress))
