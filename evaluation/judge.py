"""Judge a quantised class-conditional model, so that a search can choose group sizes.

The loss of a model (Q-DiT, equation 5) is minus the SQNR in dB of its latents to the float
model's, or the FID of its images to real ones. Less is better.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import config
from diffusion.generate import Sampling, decode_images, generate_latents
from evaluation.features import Extractor, extract, load_set
from evaluation.metrics import frechet_distance, sqnr_db, statistics

BATCH = 50  # images at a time


@dataclass(frozen=True)
class Judge:
    """The ``loss`` of a quantised model, with a description that changes whenever it would."""

    loss: Callable[[nn.Module], float]
    description: str


def sqnr_judge(model: nn.Module, sampling: Sampling) -> Judge:
    """Judge by minus the SQNR in dB of a few final latents.

    The reference is those of the float ``model`` with the same noise.
    """
    indices = range(config.judge_images)
    labels = torch.tensor(config.default_labels(model.num_classes, len(indices)))

    def latents_of(sampled: nn.Module) -> Tensor:
        return _latents(sampled, sampling, indices, labels)

    reference = latents_of(model)

    def negative_sqnr(quantised: nn.Module) -> float:
        return -sqnr_db(reference, latents_of(quantised))

    return Judge(negative_sqnr, f"SQNR of {len(indices)} latents, {sampling}")


def fid_judge(
    decode: Callable[[Tensor], Tensor],
    extractor: Extractor,
    reference: Path,
    sampling: Sampling,
) -> Judge:
    """Judge by the FID of ``config.judge_fid_images`` images to those of an ``.npz``."""
    real = load_set(reference, extractor).pool
    count = config.judge_fid_images

    def fid(quantised: nn.Module) -> float:
        batches = []
        for start in range(0, count, BATCH):
            indices = range(start, min(start + BATCH, count))
            labels = torch.tensor([i % quantised.num_classes for i in indices])
            latents = _latents(quantised, sampling, indices, labels)
            batches.append(decode_images(decode, latents))
        features = extract(np.concatenate(batches), extractor, BATCH, "features")
        return frechet_distance(statistics(features["pool"]), real)

    return Judge(fid, f"FID of {count} images to {reference.name}, {sampling}")


def _latents(model: nn.Module, sampling: Sampling, indices: range, labels: Tensor) -> Tensor:
    """Sample the final latents (N, C, H, W) of some images."""
    return generate_latents(
        model, sampling.schedule, indices, labels, sampling.seed, sampling.cfg_scale,
        sampling.step)
