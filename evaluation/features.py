"""Image sets as a network sees them: features of an ``.npz``, cached beside it."""
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from evaluation.metrics import Statistics, statistics
from files.atomic import atomic
from files.npz import read_arrays, read_images

FEATURE_NAMES = ("pool", "spatial", "logits")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass(frozen=True)
class Extractor:
    """A network that judges images.

    Attributes:
        name: identifies network and weights; part of a cache file's key.
        widths: of ``pool`` (FID, precision, recall), ``spatial`` (sFID) and ``logits`` (Inception
            Score).
        run: uint8 images (B, 3, H, W) on ``device`` to these three, float32 (B, width).
        side: H = W that it needs, None for any.
    """

    name: str
    widths: tuple[int, int, int]
    run: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    device: torch.device
    side: int | None = None


@dataclass(frozen=True)
class ImageSet:
    """What is known of a set of images.

    Attributes:
        name: for messages.
        count: how many images, None where only their statistics are known.
        size: (H, W) of the images, or None.
        pool, spatial: normal distributions fitted to these features.
        pool_features: (N, D), or None.
        logits: (N, K), or None.
    """

    name: str
    count: int | None
    size: tuple[int, int] | None
    pool: Statistics
    spatial: Statistics
    pool_features: NDArray | None
    logits: NDArray | None


@torch.inference_mode()
def extract(images: NDArray, extractor: Extractor, batch: int, desc: str) -> dict[str, NDArray]:
    """Compute the features of uint8 images (N, H, W, 3), ``batch`` at a time.

    Args:
        desc: names the progress bar.

    Returns:
        ``pool``, ``spatial`` and ``logits``, float32 (N, width) each.
    """
    features = {
        name: np.empty((len(images), width), np.float32)
        for name, width in zip(FEATURE_NAMES, extractor.widths)
    }
    with tqdm(total=len(images), desc=desc, unit="image") as bar:
        for start in range(0, len(images), batch):
            # Mapped arrays cannot be written to, and torch wants ones that can.
            pixels = torch.from_numpy(np.array(images[start:start + batch]))
            outputs = extractor.run(pixels.permute(0, 3, 1, 2).to(extractor.device))
            for array, values in zip(features.values(), outputs):
                array[start:start + len(pixels)] = values.cpu().numpy()
            bar.update(len(pixels))
    return features


def _digest(images: NDArray) -> NDArray:
    """Compute the SHA-256 of images and their shape, uint8 (32,)."""
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    return np.frombuffer(digest.digest(), np.uint8)


def cache_path(path: Path, extractor: Extractor) -> Path:
    """Name the file that keeps the features of the ``.npz`` at ``path``."""
    return path.with_name(f"{path.stem}.features-{extractor.name}.npz")


def cached_features(
    path: Path,
    images: NDArray,  # uint8 (N, H, W, 3), what the file at ``path`` holds
    extractor: Extractor,
    batch: int,
    cache: bool,
) -> dict[str, NDArray]:
    """Call ``extract``, or take what an earlier call left beside the file if it still fits.

    Raises:
        ValueError: the cache file is damaged, of another width, or cannot be written.
    """
    desc = f"features of {path.name}"
    if not cache:
        return extract(images, extractor, batch, desc)

    file = cache_path(path, extractor)
    digest = _digest(images)
    if file.exists():
        try:
            features = _read_cache(file, digest, len(images), extractor)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"features file '{file}' does not fit ({error}): delete it to have it made anew"
            ) from None
        if features is not None:
            return features

    features = extract(images, extractor, batch, desc)
    try:
        with atomic(file) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, images=digest, **features)
    except OSError as error:
        raise ValueError(
            f"cannot write features file '{file}': {error.strerror}; drop --cache") from None
    return features


def _read_cache(
    file: Path,
    digest: NDArray,  # of the images, see ``_digest``
    count: int,  # of the images
    extractor: Extractor,
) -> dict[str, NDArray] | None:
    """Read the features that are kept in ``file``; None where they are those of other images.

    Raises:
        ValueError: they are damaged, or not as wide as the network's.
        KeyError: some are missing.
    """
    features = read_arrays(file)
    if not np.array_equal(features["images"], digest):
        return None
    for name, width in zip(FEATURE_NAMES, extractor.widths):
        if features[name].shape != (count, width):
            raise ValueError(f"'{name}' is {features[name].shape}, expected {(count, width)}")
    return features


def _as_float64(array: NDArray) -> NDArray:
    """Convert statistics to float64.

    Raises:
        ValueError: they are not floating-point numbers.
    """
    if array.dtype.kind != "f":
        raise ValueError(f"statistics are {array.dtype}, expected floating-point numbers")
    return np.asarray(array, np.float64)


def load_set(path: Path, extractor: Extractor, batch: int = 64, cache: bool = False) -> ImageSet:
    """Read an ``.npz``: its images ``arr_0``, and their statistics.

    Statistics are ``mu sigma mu_s sigma_s`` if the file holds them, else those of its images.

    Args:
        batch: images sent through the network at once.
        cache: keep the features beside the file, and use them again.

    Raises:
        ValueError: the file is damaged, holds neither, its images are of a size that the network
            does not take, or its statistics of another width than the features.
    """
    arrays = read_arrays(path)
    stored = [key for key in STATISTICS if key in arrays]
    if stored and len(stored) < len(STATISTICS):
        raise ValueError(
            f"'{path}' holds {', '.join(stored)} only: "
            "expected all of mu, sigma, mu_s, sigma_s, or none")

    # What the network sees in the images.
    count, size, features = None, None, {}
    if "arr_0" in arrays or not stored:
        images = read_images(path, arrays)
        _check_side(path, images, extractor)
        features = cached_features(path, images, extractor, batch, cache)
        count, size = len(images), images.shape[1:3]

    # Normal distributions of it.
    if stored:
        _check_widths(path, arrays, extractor)
    try:
        if stored:
            pool = Statistics(_as_float64(arrays["mu"]), _as_float64(arrays["sigma"]))
            spatial = Statistics(_as_float64(arrays["mu_s"]), _as_float64(arrays["sigma_s"]))
        else:
            pool = statistics(features["pool"])
            spatial = statistics(features["spatial"])
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None
    return ImageSet(
        str(path), count, size, pool, spatial, features.get("pool"), features.get("logits"))


def _check_side(path: Path, images: NDArray, extractor: Extractor) -> None:
    """Check that images (N, H, W, 3) are of the size that the network needs.

    Raises:
        ValueError: they are not.
    """
    side = extractor.side
    height, width = images.shape[1:3]
    if side is not None and (height, width) != (side, side):
        raise ValueError(
            f"'{path}' holds images of {height}x{width} pixels: "
            f"features {extractor.name} need {side}x{side}")


def _check_widths(path: Path, arrays: dict[str, NDArray], extractor: Extractor) -> None:
    """Check that stored statistics are as wide as the network's features.

    Raises:
        ValueError: they are not.
    """
    pool_width, spatial_width, _ = extractor.widths
    expected = (("mu", "sigma", pool_width), ("mu_s", "sigma_s", spatial_width))
    for mean, covariance, width in expected:
        if arrays[mean].shape != (width,) or arrays[covariance].shape != (width, width):
            raise ValueError(
                f"'{mean}' and '{covariance}' of '{path}' are "
                f"{arrays[mean].shape} and {arrays[covariance].shape}: "
                f"expected width {width} (features {extractor.name})")
