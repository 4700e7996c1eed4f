"""Batches of images by global index: what an image looks like does not depend on who makes it."""
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion.noise import ImageNoise, image_labels
from diffusion.sampler import Step, guided_denoiser, sample_loop
from diffusion.schedule import Schedule
from files.images import to_bytes


def batch_indices(batch: int, size: int) -> range:
    """Batch ``k`` is always images ``k * size`` to ``(k + 1) * size - 1``, however many of them are wanted."""
    return range(batch * size, (batch + 1) * size)


def labels_for(indices: Sequence[int], seed: int, num_classes: int, listed: Sequence[int] | None) -> Tensor:
    """(N,) int64: random by (seed, index), or ``listed`` over and over."""
    if listed is None:
        return image_labels(seed, indices, num_classes)
    return torch.tensor([listed[i % len(listed)] for i in indices])


def guided_drive(
    schedule: Schedule,
    x: Tensor,
    draw: Callable[[], Tensor],
    labels: Tensor,
    cfg_scale: float,
) -> Callable[[nn.Module], None]:
    """Make a function that lets a model sample once with guidance, for what hooks see of it.

    Args:
        schedule: its steps, shown in a progress bar.
        x: (N, C, H, W) pure noise to start from, on the model's device.
        draw: fresh noise like ``x`` for every step; a stream goes on where it stopped, so a second
            run of the function sees other noise.
        labels: (N,) int64, on the model's device.
        cfg_scale: guidance scale; 1 runs the labelled half alone.
    """

    def drive(model: nn.Module) -> None:
        latents = sample_loop(guided_denoiser(model, labels, cfg_scale), schedule, x, draw)
        for _ in tqdm(latents, total=len(schedule), desc="trajectory", unit="step"):
            pass

    return drive


def latents_by_step(model: nn.Module, schedule: Schedule, indices: Sequence[int], labels: Tensor, seed: int, cfg_scale: float,
                    step: Step) -> Iterator[Tensor]:
    """Latents (N, C, H, W) after each step of the images with these global indices and labels (N,), on the model's device."""
    device = model.pos_embed.device
    noise = ImageNoise(seed, indices, (model.in_channels, model.input_size, model.input_size), device)
    return sample_loop(guided_denoiser(model, labels.to(device), cfg_scale), schedule, noise(), noise, step)


@torch.inference_mode()
def generate_latents(model: nn.Module, schedule: Schedule, indices: Sequence[int], labels: Tensor, seed: int, cfg_scale: float,
                     step: Step) -> Tensor:
    """The last of ``latents_by_step``."""
    for latents in latents_by_step(model, schedule, indices, labels, seed, cfg_scale, step):
        pass
    return latents


@torch.inference_mode()
def generate_images(model: nn.Module, decode: Callable[[Tensor], Tensor], schedule: Schedule, indices: Sequence[int], labels: Tensor,
                    seed: int, cfg_scale: float, step: Step, decode_batch: int | None = None) -> np.ndarray:
    """uint8 (N, H, W, 3); as ``generate_latents``, decoded ``decode_batch`` at a time (None: all at once).

    Raises:
        ValueError: the model produced NaN.
    """
    latents = generate_latents(model, schedule, indices, labels, seed, cfg_scale, step)
    return np.concatenate([to_bytes(decode(part)) for part in latents.split(decode_batch or len(latents))])
