"""FVD: the Fréchet distance of videos as a video network sees them (Unterthiner et al., 2019).

Q-DiT chooses group sizes for video models by it (equation 5). Only the network differs from FID.
"""
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from config import FRAMES
from errors import UserError
from evaluation.metrics import Statistics, frechet_distance, statistics
from examples.bundles import find_videos
from files.digests import sha256
from files.npz import read_arrays, read_videos

SIDE = 224  # pixels per side that I3D was trained on
WIDTHS = (400, 2048)  # features of the usual networks: Kinetics' classes, or what is below them

# What the usual file is called with, as far as it asks: the input is prepared here, and its
# features are those before the softmax.
I3D_OPTIONS = {"rescale": False, "resize": False, "return_features": True}


@dataclass(frozen=True)
class VideoExtractor:
    """A network that judges videos.

    Attributes:
        name: identifies network and weights.
        run: uint8 videos (B, FRAMES, 3, H, W) on ``device`` to features (B, D).
        side: H = W that it needs, None for any.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    device: torch.device
    side: int | None = None


@dataclass(frozen=True)
class VideoSet:
    """What is known of a set of videos: how many there are, and a normal fitted to features."""

    count: int
    features: Statistics


def load_video_set(path: Path, extractor: VideoExtractor, batch: int) -> VideoSet:
    """Read an ``.npz`` of videos ``arr_0``, uint8 (N, F, H, W, 3), and look at them.

    Args:
        batch: videos sent through the network at once.

    Raises:
        ValueError: the file is damaged, or its videos are too short, too few or of a size that the
            network does not take.
    """
    videos = read_videos(path, read_arrays(path))
    if len(videos) < 2:
        raise ValueError(f"'{path}': 1 video is too few: expected at least 2")
    try:
        features = video_features(videos, extractor, batch, f"features of {path.name}")
        return VideoSet(len(videos), statistics(features))
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None


def fvd(reference: VideoSet, samples: VideoSet) -> float:
    """Compute the Fréchet video distance, the same as FID's on other features."""
    return frechet_distance(reference.features, samples.features)


@torch.inference_mode()
def video_features(
    videos: NDArray, extractor: VideoExtractor, batch: int, desc: str
) -> NDArray:
    """Compute the features (N, D), float32, of uint8 videos (N, F, H, W, 3).

    Args:
        batch: videos at a time.
        desc: names the progress bar.

    Raises:
        ValueError: they are too short, or of a size that the network does not take.
    """
    frames, height, width = videos.shape[1:4]
    if frames < FRAMES:
        raise ValueError(f"videos of {frames} frames are too short: expected at least {FRAMES}")
    side = extractor.side
    if side is not None and (height, width) != (side, side):
        raise ValueError(f"videos of {height}x{width} pixels: "
                         f"features {extractor.name} need {side}x{side}")
    features = []
    with tqdm(total=len(videos), desc=desc, unit="video") as bar:
        for start in range(0, len(videos), batch):
            # Mapped arrays cannot be written to, and torch wants ones that can.
            pixels = torch.from_numpy(np.array(videos[start:start + batch, :FRAMES]))
            pixels = pixels.permute(0, 1, 4, 2, 3).to(extractor.device)
            features.append(extractor.run(pixels).float().cpu().numpy())
            bar.update(len(pixels))
    return np.concatenate(features)


def load_video_extractor(kind: str, i3d: str | None, device: torch.device) -> VideoExtractor:
    """Load the network that judges videos.

    Args:
        kind: a family of ``examples.bundles``, whose stand-in a file given replaces.
        i3d: a TorchScript file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if i3d is not None:
        return i3d_extractor(Path(i3d), device)
    videos = find_videos(kind)
    if videos is not None:
        return videos.extractor(device)
    raise UserError("FVD needs a video network: give --i3d FILE, a TorchScript file such as "
                    "i3d_torchscript.pt (the digits alone have a stand-in of their own)")


def i3d_extractor(path: Path, device: torch.device) -> VideoExtractor:
    """Wrap a TorchScript file that maps (B, 3, 16, 224, 224) in [-1, 1] to 400 or 2048 features.

    Raises:
        UserError: it is missing, or no TorchScript.
    """
    if not path.is_file():
        raise UserError(f"video network '{path}' does not exist: give a TorchScript file")
    try:
        with warnings.catch_warnings():
            # The published files are TorchScript, which later versions of torch call deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError:
        raise UserError(f"'{path}' is no TorchScript file: "
                        "give one such as i3d_torchscript.pt") from None
    arguments = {argument.name for argument in network.forward.schema.arguments}
    options = {name: value for name, value in I3D_OPTIONS.items() if name in arguments}

    def run(videos: Tensor) -> Tensor:
        try:
            features = network(prepare(videos), **options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"video network '{path}' does not take (B, 3, {FRAMES}, {SIDE}, {SIDE}): {reason}"
            ) from None
        check_width(features, path)
        return features

    return VideoExtractor(f"i3d-{sha256(path)[:8]}", run, device)


def check_width(features: object, path: Path) -> None:
    """Check that a network gave a vector of a known width for every video.

    Raises:
        ValueError: it did not.
    """
    if not isinstance(features, Tensor):
        raise ValueError(f"video network '{path}' gives {type(features).__name__}: "
                         "expected one tensor of features")
    if features.ndim != 2 or features.shape[1] not in WIDTHS:
        widths = " or ".join(f"(B, {width})" for width in WIDTHS)
        raise ValueError(f"video network '{path}' gives features of shape "
                         f"{tuple(features.shape)}: expected {widths}")


def prepare(videos: Tensor) -> Tensor:
    """Turn uint8 videos (B, T, 3, H, W) into (B, 3, T, 224, 224) in [-1, 1], as FVD's users do.

    The shorter side is resized bilinearly, without antialiasing; of the longer one the middle is
    kept.
    """
    height, width = videos.shape[3:]
    scale = SIDE / min(height, width)
    size = (math.ceil(height * scale), math.ceil(width * scale))
    frames = F.interpolate(
        videos.flatten(0, 1).float(), size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    frames = frames[..., top:top + SIDE, left:left + SIDE] / 127.5 - 1
    return frames.unflatten(0, videos.shape[:2]).transpose(1, 2)
