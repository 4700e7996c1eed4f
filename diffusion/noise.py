"""One independent random stream per image, drawn on the CPU.

An image's label and noise depend on (seed, image index) alone: not on the batch it is drawn with,
the number of processes or the device.
"""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Sub-streams of an image, so that giving a label by hand leaves its noise alone.
_LABEL = 0
_NOISE = 1


def _stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, purpose)))


def image_labels(seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """Draw a class for each image, uniformly, (N,) int64."""
    return torch.tensor([int(_stream(seed, i, _LABEL).integers(num_classes)) for i in indices])


class ImageNoise:
    """Draws standard normal noise for a batch; each call advances every image's own stream once.

    Args:
        seed: non-negative.
        indices: global index of each image of the batch.
        shape: (C, H, W) of one image.
        device: where the draws end up; they are made on the CPU.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
    ):
        self._streams = [_stream(seed, i, _NOISE) for i in indices]
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        """Return the next draw, (N, C, H, W) float32."""
        draws = [stream.standard_normal(self._shape, np.float32) for stream in self._streams]
        return torch.from_numpy(np.stack(draws)).to(self._device)


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Make a generator for each image, for code that draws its noise itself; on the CPU."""
    return [torch.Generator().manual_seed(_generator_seed(seed, index)) for index in indices]


def _generator_seed(seed: int, index: int) -> int:
    sequence = np.random.SeedSequence(seed, spawn_key=(index, _NOISE))
    return int(sequence.generate_state(1, np.uint64)[0])
