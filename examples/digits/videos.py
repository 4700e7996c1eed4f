"""Videos of digits that count up, which stand in for a video model's.

A video is 16 images in a row, whose classes follow each other: image ``i`` of all, 16 to a video,
is of class ``i mod 10``. So the bundled model makes videos, though it knows nothing of them.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from config import FRAMES
from diffusion.generate import Sampling, decode_images, generate_latents
from evaluation.video import VideoExtractor
from examples.digits.classifier import load_classifier
from examples.digits.data import IMAGE_SIZE, load_images
from files.atomic import atomic
from files.images import to_bytes

CLASSES = 10
REFERENCE_VIDEOS = 100


def frame_classes(videos: range, classes: int = CLASSES) -> Tensor:
    """Tell the class of every frame of some videos, (16 N,) int64."""
    return torch.arange(FRAMES * videos.start, FRAMES * videos.stop) % classes


def digits_video_extractor(device: torch.device) -> VideoExtractor:
    """Put the bundled classifier of images in the place of I3D, on videos of 16 x 16 pixels.

    Features are the 64 values before its last layer, averaged over frames, and how much each of
    them changes from frame to frame on average.
    """
    model = load_classifier().to(device)

    def run(videos: Tensor) -> Tensor:
        grey = (videos[:, :, :1].float() - 127.5) / 127.5            # (B, T, 1, 16, 16)
        seen = model.features(grey.flatten(0, 1))                    # (B T, 64)
        seen = seen.unflatten(0, videos.shape[:2])                   # (B, T, 64)
        changes = seen.diff(dim=1).abs()                             # (B, T - 1, 64)
        return torch.cat([seen.mean(1), changes.mean(1)], 1)         # (B, 128)

    return VideoExtractor("digits-video", run, device, IMAGE_SIZE)


def write_video_reference(path: Path) -> Path:
    """Write videos of real digits as an ``.npz``, uint8 (100, 16, 16, 16, 3); return its path.

    Every class's digits are used in the order of the data.
    """
    images, labels = load_images()
    wanted = frame_classes(range(REFERENCE_VIDEOS))
    chosen = torch.empty_like(wanted)
    for number in range(CLASSES):
        frames = (wanted == number).nonzero()[:, 0]
        chosen[frames] = (labels == number).nonzero()[:len(frames), 0]
    frames = to_bytes(images[chosen])
    with atomic(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, arr_0=as_videos(frames))
    return path


def sample_videos(
    model: nn.Module,
    videos: range,
    decode: Callable[[Tensor], Tensor],
    sampling: Sampling,
) -> NDArray:
    """Let a model of images make videos, uint8 (N, 16, H, W, 3)."""
    indices = range(FRAMES * videos.start, FRAMES * videos.stop)
    latents = generate_latents(
        model, sampling.schedule, indices, frame_classes(videos, model.num_classes),
        sampling.seed, sampling.cfg_scale, sampling.step)
    return as_videos(decode_images(decode, latents))


def as_videos(images: NDArray) -> NDArray:
    """Put 16 images (16 N, H, W, 3) in a row each, (N, 16, H, W, 3)."""
    return images.reshape(-1, FRAMES, *images.shape[1:])
