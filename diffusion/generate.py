"""Batches of images by global index: what an image looks like does not depend on who makes it.

What is sampled is a class-conditional DiT on square latents: ``in_channels`` and ``input_size`` of
the model give their shape, ``num_classes`` is its null label.
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion.noise import ImageNoise, image_labels
from diffusion.sampler import (
    Draw,
    Step,
    ddim_step,
    ddpm_step,
    guided_denoiser,
    sample_loop,
)
from diffusion.schedule import Schedule
from files.images import to_bytes


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Attributes:
        schedule: its steps.
        seed: of the noise, with an image's index.
        cfg_scale: guidance; 1 is none.
        sampler: ``ddpm`` or ``ddim``.
        eta: of ddim; 0 is deterministic.
    """

    schedule: Schedule
    seed: int
    cfg_scale: float
    sampler: str = "ddpm"
    eta: float = 0.0

    @property
    def step(self) -> Step:
        """The sampler's step."""
        return partial(ddim_step, eta=self.eta) if self.sampler == "ddim" else ddpm_step

    def __str__(self) -> str:
        return (f"{len(self.schedule)} steps of {self.sampler}, guidance {self.cfg_scale:g}, "
                f"seed {self.seed}")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model, which may have buffers alone."""
    return next(chain(model.parameters(), model.buffers())).device


def latent_noise(model: nn.Module, seed: int, indices: Sequence[int]) -> ImageNoise:
    """Make the noise of these images, shaped like the model's latents and on its device."""
    shape = (model.in_channels, model.input_size, model.input_size)
    return ImageNoise(seed, indices, shape, device_of(model))


def batch_indices(batch: int, size: int) -> range:
    """Return the images of batch ``k``: always ``k * size`` to ``(k + 1) * size - 1``.

    They do not depend on how many images are wanted.
    """
    return range(batch * size, (batch + 1) * size)


def labels_for(
    indices: Sequence[int],
    seed: int,
    num_classes: int,
    listed: Sequence[int] | None,
) -> Tensor:
    """Choose labels (N,) int64: random by (seed, index), or ``listed`` over and over."""
    if listed is None:
        return image_labels(seed, indices, num_classes)
    return torch.tensor([listed[i % len(listed)] for i in indices])


def guided_drive(
    schedule: Schedule,
    x: Tensor,
    draw: Draw,
    labels: Tensor,
    cfg_scale: float,
) -> Callable[[nn.Module], None]:
    """Make a function that lets a model sample once with guidance, for what hooks see of it.

    Args:
        schedule: its steps, shown in a progress bar.
        x: (N, C, H, W) pure noise to start from, on the model's device.
        draw: fresh noise like ``x`` for every step. A stream goes on where it stopped, so a second
            run of the function sees other noise.
        labels: (N,) int64, on the model's device.
        cfg_scale: guidance scale; 1 runs the labelled half alone.
    """

    def drive(model: nn.Module) -> None:
        steps = sample_loop(guided_denoiser(model, labels, cfg_scale), schedule, x, draw)
        for _ in tqdm(steps, total=len(schedule), desc="trajectory", unit="step"):
            pass

    return drive


def latents_by_step(
    model: nn.Module,
    schedule: Schedule,
    indices: Sequence[int],
    labels: Tensor,
    seed: int,
    cfg_scale: float,
    step: Step,
) -> Iterator[Tensor]:
    """Yield the latents (N, C, H, W) of some images after each step, on the model's device.

    Args:
        indices: global index of each image.
        labels: (N,) int64, on any device.
        seed: of the noise, with the index.
        cfg_scale: guidance scale; 1 runs the labelled half alone.
        step: ``ddpm_step`` or ``ddim_step``.
    """
    noise = latent_noise(model, seed, indices)
    denoise = guided_denoiser(model, labels.to(device_of(model)), cfg_scale)
    return sample_loop(denoise, schedule, noise(), noise, step)


@torch.inference_mode()
def generate_latents(
    model: nn.Module,
    schedule: Schedule,
    indices: Sequence[int],
    labels: Tensor,
    seed: int,
    cfg_scale: float,
    step: Step,
) -> Tensor:
    """Return the final latents (N, C, H, W) of ``latents_by_step``, whose arguments these are."""
    for latents in latents_by_step(model, schedule, indices, labels, seed, cfg_scale, step):
        final = latents
    return final


@torch.inference_mode()
def decode_images(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    batch: int | None = None,
) -> np.ndarray:
    """Decode latents (N, C, H, W) to images, uint8 (N, H, W, 3).

    Args:
        batch: latents that are decoded at a time; None for all at once.

    Raises:
        ValueError: the model produced NaN.
    """
    parts = latents.split(batch or len(latents))
    return np.concatenate([to_bytes(decode(part)) for part in parts])
