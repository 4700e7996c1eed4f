"""Real handwritten digits as 16x16 images and as 4x8x8 latents (a pixel-unshuffle stands in for a VAE)."""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from files.atomic import atomic
from files.images import to_bytes
from files.npz import write_npz

IMAGE_SIZE = 16


def load_images() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits: images (1797, 1, 16, 16) float32 in [-1, 1], resized bilinearly from 8x8, labels (1797,) int64."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8.0 - 1.0  # 17 grey levels 0..16
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(digits.target).long()


def encode(images: Tensor) -> Tensor:
    """Images (N, 1, 16, 16) to latents (N, 4, 8, 8); exact."""
    return F.pixel_unshuffle(images, 2)


def decode(latents: Tensor) -> Tensor:
    """Latents (N, 4, 8, 8) to images (N, 1, 16, 16)."""
    return F.pixel_shuffle(latents, 2)


def write_reference(path: Path) -> Path:
    """All 1797 real digits as an ``.npz`` (``arr_0``, uint8, (1797, 16, 16, 3)); returns ``path``."""
    images = to_bytes(load_images()[0])
    with atomic(path) as temporary:
        write_npz(temporary, images, images.shape)
    return path
