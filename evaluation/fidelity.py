"""How far a quantised model's images are from the float model's with the same noise.

This is what quantisation itself changes, whatever the images are worth.
"""
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.generate import Sampling, batch_indices, latents_by_step
from evaluation.metrics import psnr_db, sqnr_db
from files.images import to_bytes

# Images (N, 3, H, W) in [-1, 1], twice, to distances (N,).
Perceptual = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """Images of one model.

    Attributes:
        latents: (steps, N, C, H, W) on the CPU, after each step, noisiest first.
        images: uint8 (N, H', W', 3).
    """

    latents: Tensor
    images: NDArray


@dataclass(frozen=True)
class Fidelity:
    """Distances from the float model's run with the same noise.

    Attributes:
        sqnr_db: of the latents after each step, noisiest first; the last is that of the final
            latents, all images together.
        image_sqnr_db: mean of every image's SQNR of the final latents. A sampler may go another way
            on a few images, which decide what all have together.
        psnr_db: of the images, over all their pixels.
        lpips: mean perceptual distance of the images (Zhang et al., 2018), None where it was not
            computed.
    """

    sqnr_db: list[float]
    image_sqnr_db: float
    psnr_db: float
    lpips: float | None


@torch.inference_mode()
def sample_run(
    model: nn.Module,
    decode: Callable[[Tensor], Tensor],
    sampling: Sampling,
    labels: Sequence[int],
    batch: int,
) -> Run:
    """Sample images 0 to ``len(labels) - 1``, ``batch`` at a time, and keep every step."""
    latents, images = [], []
    for start in range(0, len(labels), batch):
        batch_labels = torch.tensor(labels[start:start + batch])
        # The last batch may be a short one.
        indices = batch_indices(start // batch, batch)[:len(batch_labels)]
        steps = list(latents_by_step(
            model, sampling.schedule, indices, batch_labels, sampling.seed, sampling.cfg_scale,
            sampling.step))
        latents.append(torch.stack(steps).cpu())
        images.append(to_bytes(decode(steps[-1])))
    return Run(torch.cat(latents, dim=1), np.concatenate(images))


@torch.inference_mode()
def seconds_to_sample(model: nn.Module, sampling: Sampling, batch: int) -> float:
    """Measure how long the latents of images 0 to ``batch - 1`` take, all of label 0."""
    def steps() -> Iterator[float]:
        labels = torch.zeros(batch, dtype=torch.long)
        for latents in latents_by_step(
                model, sampling.schedule, range(batch), labels, sampling.seed, sampling.cfg_scale,
                sampling.step):
            # A number on the CPU: a GPU is waited for.
            yield latents.sum().item()

    # The first step prepares, or compiles kernels.
    next(steps())
    start = time.perf_counter()
    list(steps())
    return time.perf_counter() - start


def compare_runs(
    reference: Run,
    test: Run,
    perceptual: Perceptual | None = None,
    batch: int = 32,
) -> Fidelity:
    """Measure how far the images of ``test`` are from the same ones of ``reference``.

    Args:
        perceptual: LPIPS, if it is to be computed, on ``batch`` pairs at a time.
    """
    sqnr = [sqnr_db(a, b) for a, b in zip(reference.latents, test.latents)]
    pairs = zip(reference.latents[-1], test.latents[-1])
    image_sqnr = mean(sqnr_db(a, b) for a, b in pairs)
    psnr = psnr_db(_one_image(reference.images), _one_image(test.images))
    lpips = None
    if perceptual is not None:
        lpips = _mean_distance(perceptual, reference.images, test.images, batch)
    return Fidelity(sqnr, image_sqnr, float(psnr[0]), lpips)


def _one_image(images: NDArray) -> NDArray:
    """Reshape images (N, H, W, 3) to a single one (1, N H W, 1, 3) of all their pixels."""
    return images.reshape(1, -1, 1, 3)


@torch.inference_mode()
def _mean_distance(perceptual: Perceptual, a: NDArray, b: NDArray, batch: int) -> float:
    """Average the perceptual distances of the pairs of uint8 images (N, H, W, 3)."""
    first_batches = _as_floats(a).split(batch)
    second_batches = _as_floats(b).split(batch)
    distances = [
        perceptual(first, second).cpu()
        for first, second in zip(first_batches, second_batches)
    ]
    return float(torch.cat(distances).mean())


def _as_floats(images: NDArray) -> Tensor:
    """Convert uint8 images (N, H, W, 3) to (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
