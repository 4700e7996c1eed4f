"""Noto's colour emoji on white, 64 x 64 pixels, with names and categories.

The images are Google's (Apache-2.0, see ``NOTICE``), from the npm package
``emoji-datasource-google``. ``rebuild.py`` makes the bundled file from it.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from errors import UserError
from files.atomic import atomic
from files.npz import read_arrays, write_npz

BUNDLED = Path(__file__).with_name("emoji.npz")
TONES = Path("results/emoji/tones.npz")
IMAGE_SIZE = 64
# What DiT-Emoji draws: 459 emoji in 31 subcategories.
DRAWN = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")


@dataclass(frozen=True)
class Emoji:
    """Images and what they show, one entry each, in Unicode's own order.

    Attributes:
        images: uint8 (N, 64, 64, 3).
        names: such as "cat face with tears of joy".
        keywords: short names, separated by spaces.
        categories: such as "Smileys & Emotion".
        subcategories: such as "cat-face".
    """

    images: NDArray
    names: NDArray
    keywords: NDArray
    categories: NDArray
    subcategories: NDArray

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, chosen: NDArray) -> "Emoji":
        """Return the emoji that a mask or indices choose."""
        return Emoji(*(array[chosen] for array in vars(self).values()))


def load_emoji() -> Emoji:
    """Load the 1911 bundled emoji, those without skin tones."""
    return Emoji(**read_arrays(BUNDLED))


def drawn_emoji() -> Emoji:
    """Load the 459 emoji that DiT-Emoji was trained on."""
    emoji = load_emoji()
    return emoji.pick(np.isin(emoji.categories, DRAWN))


def class_names() -> list[str]:
    """Name DiT-Emoji's classes, in the order of their labels: the subcategories it draws."""
    return list(dict.fromkeys(drawn_emoji().subcategories.tolist()))


def class_categories() -> list[str]:
    """Name the category of each of DiT-Emoji's classes."""
    emoji = drawn_emoji()
    of = dict(zip(emoji.subcategories.tolist(), emoji.categories.tolist()))
    return [of[name] for name in class_names()]


def class_labels(emoji: Emoji) -> Tensor:
    """Return the class of each drawn emoji, (N,) int64."""
    number = {name: label for label, name in enumerate(class_names())}
    return torch.tensor([number[name] for name in emoji.subcategories.tolist()])


def load_tones(path: Path = TONES) -> tuple[NDArray, NDArray]:
    """Load the 1875 emoji with skin tones, which are not bundled.

    Returns:
        Images uint8 (1875, 64, 64, 3), and the index (1875,) of the bundled emoji that each varies.

    Raises:
        UserError: ``rebuild.py`` has not written them yet.
    """
    if not path.exists():
        raise UserError(
            f"the emoji with skin tones are missing ('{path}'): "
            "write them with python -m examples.emoji.rebuild PACKAGE.tgz")
    arrays = read_arrays(path)
    return arrays["images"], arrays["base"]


def to_tensor(images: NDArray) -> Tensor:
    """Turn uint8 (N, H, W, 3) into float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def write_reference(path: Path) -> Path:
    """Write what DiT-Emoji learned, 459 emoji and their mirror images, and return the path.

    The file's ``arr_0`` is uint8 (918, 64, 64, 3).
    """
    images = drawn_emoji().images
    images = np.concatenate([images, images[:, :, ::-1]])
    with atomic(path) as temporary:
        write_npz(temporary, images, images.shape)
    return path
