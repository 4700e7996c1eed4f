"""What group sizes are chosen by (Q-DiT, equation 5): how near a quantised model's images are to the float model's, or to real ones."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import config
from diffusion import Schedule, ddpm_step
from diffusion.generate import decode_images, generate_latents
from evaluation.features import Extractor, extract, load_set
from evaluation.metrics import frechet_distance, sqnr_db, statistics

BATCH = 50  # images at a time


@dataclass(frozen=True)
class Judge:
    """The ``loss`` of a quantised model, with a description that changes whenever the loss would."""

    loss: Callable[[nn.Module], float]
    description: str


def sqnr_judge(model: nn.Module, schedule: Schedule, seed: int) -> Judge:
    """Minus the SQNR in dB of a few final latents against those of the float ``model`` with the same noise."""
    indices = range(config.judge_images)
    labels = torch.tensor(config.default_labels(model.num_classes, len(indices)))

    def latents(each: nn.Module) -> Tensor:
        return generate_latents(each, schedule, indices, labels, seed, config.calibration_cfg_scale, ddpm_step)

    reference = latents(model)
    return Judge(lambda quantised: -sqnr_db(reference, latents(quantised)), f"SQNR of {len(indices)} latents, {len(schedule)} steps, seed {seed}")


def fid_judge(decode: Callable[[Tensor], Tensor], extractor: Extractor, reference: Path, schedule: Schedule, seed: int) -> Judge:
    """FID of ``config.judge_fid_images`` images to those of an ``.npz``."""
    pool = load_set(reference, extractor).pool

    def fid(quantised: nn.Module) -> float:
        images = []
        for begin in range(0, config.judge_fid_images, BATCH):
            indices = range(begin, min(begin + BATCH, config.judge_fid_images))
            labels = torch.tensor([i % quantised.num_classes for i in indices])
            latents = generate_latents(
                quantised, schedule, indices, labels, seed, config.calibration_cfg_scale, ddpm_step)
            images.append(decode_images(decode, latents))
        return frechet_distance(statistics(extract(np.concatenate(images), extractor, BATCH, "features")["pool"]), pool)
    return Judge(fid, f"FID of {config.judge_fid_images} images to {reference.name}, {len(schedule)} steps, seed {seed}")
