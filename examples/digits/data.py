"""Real handwritten digits as 16x16 images and as 4x8x8 latents.

A pixel-unshuffle stands in for a VAE.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from files.atomic import atomic
from files.images import to_bytes
from files.npz import write_npz

IMAGE_SIZE = 16


def load_images() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's digits, resized bilinearly from 8x8.

    Returns:
        Images (1797, 1, 16, 16) float32 in [-1, 1], and labels (1797,) int64.
    """
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8.0 - 1.0  # grey levels 0..16
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return images, torch.from_numpy(digits.target).long()


def encode(images: Tensor) -> Tensor:
    """Turn images (N, 1, 16, 16) into latents (N, 4, 8, 8), exactly."""
    return F.pixel_unshuffle(images, 2)


def decode(latents: Tensor) -> Tensor:
    """Turn latents (N, 4, 8, 8) into images (N, 1, 16, 16)."""
    return F.pixel_shuffle(latents, 2)


def write_reference(path: Path) -> Path:
    """Write all real digits as an ``.npz`` and return its path.

    Its ``arr_0`` is uint8 (1797, 16, 16, 3).
    """
    images, _ = load_images()
    images = to_bytes(images)
    with atomic(path) as temporary:
        write_npz(temporary, images, images.shape)
    return path
