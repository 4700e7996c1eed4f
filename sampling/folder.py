"""A folder of numbered images.

They are written so that a half-written, foreign or damaged one is never taken for done.
"""
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from files.atomic import atomic
from files.npz import write_npz

MARK = "ditas"  # keyword of the PNG text chunk
_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of a PNG
_TEMPORARY = re.compile(r"\.(\d{6,})\.png\..*\.tmp")


class ImageFolder:
    """Images ``%06d.png``, each marked with its index and a hash of what it was made with.

    Args:
        path: an existing folder.
        fingerprint: of its manifest.
        size: pixels per side; None: what is in the folder says it.
    """

    def __init__(self, path: Path, fingerprint: str, size: int | None):
        self.path = path
        self.fingerprint = fingerprint
        self._size = None if size is None else (size, size)

    def file(self, index: int) -> Path:
        """Name the file of an image."""
        return self.path / f"{index:06d}.png"

    def save(self, index: int, pixels: np.ndarray) -> None:
        """Write one image, uint8 (H, W, 3)."""
        info = PngInfo()
        info.add_text(MARK, f"{index} {self.fingerprint}")
        with atomic(self.file(index)) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)

    def load(self, index: int) -> np.ndarray | None:
        """Read an image, uint8 (H, W, 3).

        Returns:
            None if it is missing, damaged, or not the one that belongs here.
        """
        try:
            data = self.file(index).read_bytes()
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                pixels = np.asarray(image)  # decodes every chunk but the last
                marked = image.text.get(MARK) == f"{index} {self.fingerprint}"
                fits = image.mode == "RGB" and self._size in (None, image.size)
        except (OSError, SyntaxError, ValueError, EOFError):
            return None
        return pixels if marked and fits and data.endswith(_END) else None

    def missing(self, indices: Iterable[int]) -> Iterator[int]:
        """Yield those of ``indices`` whose image has to be made.

        Files are decoded on several threads.
        """
        def look(index: int) -> tuple[int, bool]:
            return index, self.load(index) is not None

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for index, there in pool.map(look, indices):
                if not there:
                    yield index

    def remove_leftovers(self, mine: Callable[[int], bool] | None) -> None:
        """Delete temporary files of killed processes.

        Only for the holder of the lock.

        Args:
            mine: accepts the indices of images whose files go; None: all files go.
        """
        for file in self.path.glob(".*.tmp"):
            match = _TEMPORARY.fullmatch(file.name)
            if mine is None or (match and mine(int(match[1]))):
                file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all images, the manifest and the grid."""
        for file in self.path.iterdir():
            if re.fullmatch(r"\d{6,}\.png|manifest\.json|samples\.png", file.name):
                file.unlink()

    def assemble(self, npz: Path, count: int, progress=iter) -> None:
        """Write images 0 to ``count - 1`` as ``arr_0`` of an ``.npz``.

        Args:
            progress: wraps the indices, to show how far it is.

        Raises:
            ValueError: an image is missing, or of another size than the first; names it. Nothing
                is written.
        """
        shape = self._load(0).shape

        def images():
            for index in progress(range(count)):
                pixels = self._load(index)
                if pixels.shape != shape:
                    raise ValueError(f"image {self.file(index)} is not as large as the first: "
                                     "delete it, then run the sampling command again")
                yield pixels

        with atomic(npz, durable=True) as temporary:
            write_npz(temporary, images(), (count, *shape))

    def _load(self, index: int) -> np.ndarray:
        pixels = self.load(index)
        if pixels is None:
            raise ValueError(f"image {self.file(index)} is missing or damaged: "
                             "run the sampling command again")
        return pixels
