"""What the benchmarks measure on: models, and where their calibration starts."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import config
from architectures.registry import architecture_of
from architectures.sites import Site
from cards import DiT_models
from diffusion import Schedule
from diffusion.generate import guided_drive, latent_noise
from download import load_model
from models import DiT
from quant.calibration.trajectory import Drive, Trajectory, replay
from quant.calibration.watch import Watch
from quant.layers.quantised import QuantizedLayer
from report.layers import OutputErrors


def load_bundled(name: str = "DiT-Digits") -> DiT:
    """Load a bundled model on the CPU."""
    card = DiT_models[name]
    size = card.image_sizes[0]
    return load_model(name, card, size, card.num_classes, None, torch.device("cpu"))


@torch.no_grad()
def randomise(model: nn.Module, std: float) -> None:
    """Draw every weight anew, modulation and output included, so that all layers compute."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=std)


def block_sites(model: nn.Module) -> list[Site]:
    """List the sites of attention and MLP in every block, each of a single linear."""
    return architecture_of(model).sites(model, "blocks")


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Find the linears of attention and MLP in every block, by name."""
    return {site.name: model.get_submodule(site.name) for site in block_sites(model)}


@dataclass(frozen=True)
class Start:
    """What a calibration trajectory starts from.

    Attributes:
        x: (N, C, H, W) noise.
        draw: noise like it for every step.
        labels: (N,) int64.
    """

    x: Tensor
    draw: Callable[[], Tensor]
    labels: Tensor

    def drive(self, schedule: Schedule) -> Drive:
        """Make the drive of a calibration."""
        scale = config.calibration_cfg_scale
        return guided_drive(schedule, self.x, self.draw, self.labels, scale)


def calibration_start(model: DiT, images: int, seed: int = 0) -> Start:
    """Make the start of a calibration trajectory: noise, and every class in turn."""
    noise = latent_noise(model, seed, range(images))
    return Start(noise(), noise, torch.arange(images) % model.num_classes)


def output_sqnr(
    model: DiT,
    quantised: dict[str, QuantizedLayer],
    trajectory: Trajectory,
    tokens: int = 1024,
) -> dict[str, float]:
    """Measure the SQNR in dB of each layer's output, bias aside, on a trajectory's inputs.

    Args:
        tokens: of the trajectory, in one call of the model.
    """
    linears = block_linears(model)
    errors = OutputErrors(linears, quantised)
    watch = Watch()
    for name in linears:
        watch.add(name, OutputErrors, partial(errors.observer, name))
    replay(model, trajectory, watch, tokens, "layers")
    return errors.decibels()
