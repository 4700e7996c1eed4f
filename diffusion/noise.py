"""One independent random stream per image, drawn on the CPU.

An image's label and noise depend on (seed, image index) alone: not on the batch it is drawn with, the number of processes
or the device.
"""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_LABEL, _NOISE = 0, 1  # sub-streams of an image, so that giving a label by hand leaves its noise alone


def _stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, purpose)))


def image_labels(seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """Uniformly random class of each image, (N,) int64."""
    return torch.tensor([int(_stream(seed, i, _LABEL).integers(num_classes)) for i in indices])


class ImageNoise:
    """Standard normal draws for a batch: each call advances every image's own stream once.

    Args:
        seed: non-negative.
        indices: global index of each image of the batch.
        shape: (C, H, W) of one image.
        device: where the draws end up; they are made on the CPU.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self._streams = [_stream(seed, i, _NOISE) for i in indices]
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        """The next draw, (N, C, H, W) float32."""
        draws = np.stack([stream.standard_normal(self._shape, dtype=np.float32) for stream in self._streams])
        return torch.from_numpy(draws).to(self._device)
