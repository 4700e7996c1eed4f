"""Images as bytes and in grids, and the .npz that holds them."""
import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.utils import make_grid

from files.images import grid, side_by_side, to_bytes
from files.npz import write_npz


def test_bytes_are_the_published_formula():
    values = torch.linspace(-1.2, 1.2, 4 * 5 * 5).reshape(4, 1, 5, 5)
    out = to_bytes(values)
    assert out.shape == (4, 5, 5, 3) and out.dtype == np.uint8
    for index in np.ndindex(4, 5, 5):
        image, row, column = index
        value = np.float32(127.5) * values[image, 0, row, column].numpy() + np.float32(128.0)
        # Truncated, not rounded.
        expected = int(min(max(value, 0), 255))
        assert out[index].tolist() == [expected] * 3


def test_colours_keep_their_place_and_nan_is_refused():
    image = torch.full((1, 3, 2, 2), -1.0)
    image[0, 1] = 1.0
    assert to_bytes(image)[0, 0, 0].tolist() == [0, 255, 0]
    image[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        to_bytes(image)


IMAGE_SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.just(3))


@given(hnp.arrays(np.uint8, IMAGE_SHAPES))
def test_npz_is_what_numpy_writes(images):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        write_npz(path, iter(images), images.shape)
        expected = io.BytesIO()
        np.savez(expected, arr_0=images)
        assert path.read_bytes() == expected.getvalue()
        assert zipfile.is_zipfile(path) and np.array_equal(np.load(path)["arr_0"], images)


@pytest.mark.parametrize("images, message", [
    ([np.zeros((2, 2, 3), np.uint8)], "got 1 images, expected 2"),
    ([np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.float32)], "image 1 is float32"),
    ([np.zeros((3, 2, 3), np.uint8)] * 2, "expected uint8 \\(2, 2, 3\\)"),
])
def test_npz_refuses_what_does_not_fit(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "a.npz", images, (2, 2, 2, 3))


@pytest.mark.parametrize("count, columns", [(16, 4), (7, 3), (2, 4)])
def test_a_grid_is_torchvisions(count, columns):
    images = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8)
    tiles = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = make_grid(tiles, columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(grid(images, columns)), expected)


def test_pictures_show_every_image():
    images = np.stack([np.full((16, 16, 3), 10 * i, np.uint8) for i in range(16)])
    picture = np.asarray(grid(images, columns=4))
    assert set(np.unique(picture)) == {10 * i for i in range(16)} | {255}
    pair = side_by_side([grid(images, 4), grid(images, 4)], ["float", "W4A8"])
    assert pair.width == 2 * picture.shape[1] + 16
    assert pair.height == picture.shape[0] + 20
