"""Image sets as features: what a network sees in an ``.npz``, cached beside it, and ADM's metrics of two such sets."""
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from evaluation.metrics import (
    Statistics,
    statistics,
)
from files.atomic import atomic
from files.npz import read_arrays, read_images


@dataclass(frozen=True)
class Extractor:
    """A network that judges images.

    Attributes:
        name: identifies network and weights; part of a cache file's key.
        widths: of ``pool`` (FID, precision, recall), ``spatial`` (sFID) and ``logits`` (Inception Score).
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
    """Features ``pool``, ``spatial``, ``logits`` of uint8 images (N, H, W, 3), ``batch`` at a time, float32 (N, width)."""
    found = {key: np.empty((len(images), width), np.float32) for key, width in zip(("pool", "spatial", "logits"), extractor.widths)}
    with tqdm(total=len(images), desc=desc, unit="image") as bar:
        for begin in range(0, len(images), batch):
            block = torch.from_numpy(np.array(images[begin:begin + batch])).permute(0, 3, 1, 2).to(extractor.device)
            for array, values in zip(found.values(), extractor.run(block)):
                array[begin:begin + len(block)] = values.cpu().numpy()
            bar.update(len(block))
    return found


def _digest(images: NDArray) -> NDArray:
    """SHA-256 of images and their shape, uint8 (32,)."""
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    return np.frombuffer(digest.digest(), np.uint8)


def cache_path(path: Path, extractor: Extractor) -> Path:
    """Where the features of the ``.npz`` at ``path`` are kept."""
    return path.with_name(f"{path.stem}.features-{extractor.name}.npz")


def cached_features(path: Path, images: NDArray, extractor: Extractor, batch: int, cache: bool) -> dict[str, NDArray]:
    """``extract``, or what an earlier call with ``cache`` left beside the file, if the images are still the same.

    Raises:
        ValueError: the cache file is damaged, of another width, or cannot be written.
    """
    if not cache:
        return extract(images, extractor, batch, f"features of {path.name}")
    file, key = cache_path(path, extractor), _digest(images)
    if file.exists():
        try:
            found = read_arrays(file)
            shapes = {name: (len(images), width) for name, width in zip(("pool", "spatial", "logits"), extractor.widths)}
            if np.array_equal(found["images"], key):
                wrong = [name for name, shape in shapes.items() if found[name].shape != shape]
                if wrong:
                    raise ValueError(f"'{wrong[0]}' is {found[wrong[0]].shape}, expected {shapes[wrong[0]]}")
                return found
        except (ValueError, KeyError) as error:
            raise ValueError(f"features file '{file}' does not fit ({error}): delete it to have it made anew") from None
    found = extract(images, extractor, batch, f"features of {path.name}")
    try:
        with atomic(file) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, images=key, **found)
    except OSError as error:
        raise ValueError(f"cannot write features file '{file}': {error.strerror}; drop --cache") from None
    return found


def _real(array: NDArray) -> NDArray:
    if array.dtype.kind != "f":
        raise ValueError(f"statistics are {array.dtype}, expected floating-point numbers")
    return np.asarray(array, np.float64)


def load_set(path: Path, extractor: Extractor, batch: int = 64, cache: bool = False) -> ImageSet:
    """Read an ``.npz``: statistics ``mu sigma mu_s sigma_s`` if it holds them, else those of its ``arr_0``.

    Raises:
        ValueError: the file is damaged, holds neither, its images are of a size that the network does not take, or its statistics of
            another width than the features.
    """
    arrays = read_arrays(path)
    given = [key for key in ("mu", "sigma", "mu_s", "sigma_s") if key in arrays]
    if given and len(given) < 4:
        raise ValueError(f"'{path}' holds {', '.join(given)} only: expected all of mu, sigma, mu_s, sigma_s, or none")
    features, images = None, None
    if "arr_0" in arrays or not given:
        images = read_images(path, arrays)
        if extractor.side is not None and images.shape[1:3] != (extractor.side, extractor.side):
            raise ValueError(f"'{path}' holds images of {images.shape[1]}x{images.shape[2]} pixels: features {extractor.name} need "
                             f"{extractor.side}x{extractor.side}")
        features = cached_features(path, images, extractor, batch, cache)
    if given:
        pairs = (("mu", "sigma", extractor.widths[0]), ("mu_s", "sigma_s", extractor.widths[1]))
        for mean, covariance, width in pairs:
            if arrays[mean].shape != (width,) or arrays[covariance].shape != (width, width):
                raise ValueError(f"'{mean}' and '{covariance}' of '{path}' are {arrays[mean].shape} and {arrays[covariance].shape}: "
                                 f"expected width {width} (features {extractor.name})")
        made = [lambda pair=pair: Statistics(*(_real(arrays[key]) for key in pair[:2])) for pair in pairs]
    else:
        made = [lambda key=key: statistics(features[key]) for key in ("pool", "spatial")]
    try:
        pool, spatial = (make() for make in made)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None
    return ImageSet(str(path), None if images is None else len(images), None if images is None else images.shape[1:3], pool, spatial,
                    None if features is None else features["pool"], None if features is None else features["logits"])


