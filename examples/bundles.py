"""The families of bundled models: what each brings along, in a row of ``BUNDLES``.

A family's files are imported when it is asked for.
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.decoding import Decoder


@dataclass(frozen=True)
class Videos:
    """What lets a family of models of images stand in for models of videos.

    Attributes:
        extractor: loads the network that judges videos, an ``evaluation.video.VideoExtractor``.
        write_reference: writes real videos as an ``.npz``, and returns its path.
        sample: samples the videos of some numbers from a model, uint8 (N, F, H, W, 3).
    """

    extractor: Callable[[torch.device], object]
    write_reference: Callable[[Path], Path]
    sample: Callable[..., NDArray]


@dataclass(frozen=True)
class Bundle:
    """What a family of bundled models brings along.

    Attributes:
        folder: where all of it lies, for messages.
        weights: float weights of a model, given its name.
        decoder: loads what turns latents into images.
        pipeline_decoder: loads that as the part ``vae`` of a pipeline of diffusers.
        write_reference: writes the real images as an ``.npz``, and returns its path.
        videos: None where the models make none.
    """

    folder: str
    weights: Callable[[str], dict[str, Tensor]]
    decoder: Callable[[torch.device], Decoder]
    pipeline_decoder: Callable[[], nn.Module]
    write_reference: Callable[[Path], Path]
    videos: Videos | None = None


def _digits() -> Bundle:
    from examples.digits.bundle import BUNDLE
    return BUNDLE


def _emoji() -> Bundle:
    from examples.emoji.bundle import BUNDLE
    return BUNDLE


# By ``ModelCard.bundle``.
BUNDLES: dict[str, Callable[[], Bundle]] = {"digits": _digits, "emoji": _emoji}


def find_bundle(name: str) -> Bundle | None:
    """Return what a family brings along; None where no family has this name."""
    return BUNDLES[name]() if name in BUNDLES else None


def find_videos(name: str) -> Videos | None:
    """Return what makes videos of a family's images; None where nothing does."""
    bundle = find_bundle(name)
    return None if bundle is None else bundle.videos
