"""How far a quantised model's images are from the float model's with the same noise: what quantisation itself changes."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion import Schedule
from diffusion.generate import batch_indices, latents_by_step
from diffusion.sampler import Step
from evaluation.metrics import psnr_db, sqnr_db
from files.images import to_bytes

Perceptual = Callable[[Tensor, Tensor], Tensor]  # images (N, 3, H, W) in [-1, 1], twice -> distances (N,)


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
    """Against the float model's run with the same noise.

    Attributes:
        sqnr_db: of the latents after each step, noisiest first; the last is that of the final latents.
        psnr_db: of the images, over all their pixels.
        lpips: mean perceptual distance of the images (Zhang et al., 2018), None where it was not computed.
    """

    sqnr_db: list[float]
    psnr_db: float
    lpips: float | None


@torch.inference_mode()
def sample_run(model: nn.Module, decode: Callable[[Tensor], Tensor], schedule: Schedule, labels: Sequence[int], seed: int, cfg_scale: float,
        step: Step, batch: int) -> Run:
    """Sample images 0 to ``len(labels) - 1``, ``batch`` at a time, and keep every step."""
    latents, images = [], []
    for begin in range(0, len(labels), batch):
        part = torch.tensor(labels[begin:begin + batch])
        indices = batch_indices(begin // batch, batch)[:len(part)]
        steps = list(latents_by_step(model, schedule, indices, part, seed, cfg_scale, step))
        latents.append(torch.stack(steps).cpu())
        images.append(to_bytes(decode(steps[-1])))
    return Run(torch.cat(latents, dim=1), np.concatenate(images))


def compare_runs(reference: Run, test: Run, perceptual: Perceptual | None = None, batch: int = 32) -> Fidelity:
    """Compare two runs of the same images."""
    distances = []
    if perceptual is not None:
        pair = [torch.from_numpy(run.images).permute(0, 3, 1, 2).float() / 127.5 - 1 for run in (reference, test)]
        with torch.inference_mode():
            distances = [perceptual(a, b).cpu() for a, b in zip(*(images.split(batch) for images in pair))]
    pooled = [run.images.reshape(1, -1, 1, 3) for run in (reference, test)]
    return Fidelity([sqnr_db(a, b) for a, b in zip(reference.latents, test.latents)], float(psnr_db(*pooled)[0]),
                    float(torch.cat(distances).mean()) if distances else None)
