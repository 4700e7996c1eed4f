"""What the benchmarks measure on: models, and where their calibration starts."""
import torch
from torch import nn

from diffusion.generate import latent_noise
from download import load_model
from models import DiT, DiT_models
from quant.pipeline import Start


def load_digits(name: str = "DiT-Digits") -> DiT:
    """Load a bundled model on the CPU."""
    return load_model(name, DiT_models[name], 16, 10, None, torch.device("cpu"))


@torch.no_grad()
def randomise(model: nn.Module, std: float) -> None:
    """Draw every weight anew, modulation and output included, so that all layers compute."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=std)


def calibration_start(model: DiT, images: int, seed: int = 0) -> Start:
    """Make the start of a calibration trajectory: noise, and every class in turn."""
    noise = latent_noise(model, seed, range(images))
    return Start(noise(), noise, torch.arange(images) % model.num_classes)
