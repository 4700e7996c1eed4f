"""The parts of a long run: image folder, manifest, locks, writer, what ranks say to each other."""
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion.generate import batch_indices
from errors import UserError
from sampling import manifest
from sampling.folder import MARK, ImageFolder
from sampling.job import SamplingJob
from sampling.lock import locked
from sampling.ranks import Ranks, Stopped
from sampling.writer import PENDING_BATCHES, BackgroundWriter

SIZE = 8


def pixels(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    made = ImageFolder(tmp_path, "0123456789abcdef", SIZE)
    for index in range(6):
        made.save(index, pixels(index))
    return made


def test_images_come_back_and_say_what_they_are(folder):
    assert all(np.array_equal(folder.load(index), pixels(index)) for index in range(6))
    assert Image.open(folder.file(3)).text == {MARK: "3 0123456789abcdef"}
    assert list(folder.missing(range(8))) == [6, 7] and not list(folder.path.glob(".*"))


RIGHT_MARK = "2 0123456789abcdef"


def picture(size: int = SIZE) -> Image.Image:
    return Image.fromarray(pixels(2, size))


def foreign(image, text, **save):
    info = PngInfo()
    if text:
        info.add_text(MARK, text)
    return lambda path: image.save(path, format="PNG", pnginfo=info, **save)


def cut(fraction):
    return lambda path: path.write_bytes(path.read_bytes()[:int(path.stat().st_size * fraction)])


def flip(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [
    pytest.param(lambda path: path.unlink(), id="gone"),
    pytest.param(lambda path: path.write_bytes(b""), id="empty"),
    pytest.param(lambda path: path.write_text("not a picture"), id="text"),
    pytest.param(cut(0.5), id="half"),
    pytest.param(cut(0.9), id="most"),
    pytest.param(cut(0.99), id="nearly all"),
    pytest.param(flip, id="flipped byte"),
    pytest.param(foreign(picture(), None), id="no mark"),
    pytest.param(foreign(picture(), "2 fedcba9876543210"), id="other settings"),
    pytest.param(foreign(picture(), "3 0123456789abcdef"), id="other index"),
    pytest.param(foreign(picture(16), RIGHT_MARK), id="other size"),
    pytest.param(foreign(Image.fromarray(pixels(2)[..., 0]), RIGHT_MARK), id="grey"),
    pytest.param(foreign(picture().convert("RGBA"), RIGHT_MARK), id="alpha"),
    pytest.param(lambda path: picture().save(path, format="JPEG"), id="jpeg"),
])
def test_an_image_that_does_not_belong_is_made_again(folder, damage):
    damage(folder.file(2))
    assert list(folder.missing(range(6))) == [2]
    with pytest.raises(ValueError, match="000002.png is missing or damaged"):
        folder.assemble(folder.path / "out.npz", 6)
    assert not list(folder.path.glob("*out.npz*"))


def test_npz_is_that_of_numpy(folder, tmp_path):
    folder.assemble(tmp_path / "ours.npz", 6)
    np.savez(tmp_path / "numpys.npz", arr_0=np.stack([pixels(index) for index in range(6)]))
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "numpys.npz").read_bytes()


def test_images_of_unknown_size_are_as_large_as_the_first(tmp_path):
    folder = ImageFolder(tmp_path, "0123456789abcdef", None)
    wide = [pixels(index)[:5] for index in range(3)]
    for index, image in enumerate(wide):
        folder.save(index, image)
    folder.assemble(tmp_path / "wide.npz", 3)
    with np.load(tmp_path / "wide.npz") as file:
        assert np.array_equal(file["arr_0"], np.stack(wide))
    folder.save(1, pixels(1)[:4])
    with pytest.raises(ValueError, match="000001.png is not as large as the first"):
        folder.assemble(tmp_path / "mixed.npz", 3)
    assert not (tmp_path / "mixed.npz").exists()


def test_leftovers_go_and_other_shards_keep_theirs(folder):
    names = [".000000.png.host.1.tmp", ".000007.png.host.2.tmp", ".manifest.json.host.3.tmp"]
    for name in names:
        (folder.path / name).touch()
    folder.remove_leftovers(lambda index: index < 4)
    assert sorted(path.name for path in folder.path.glob(".*")) == names[1:]
    folder.remove_leftovers(None)
    assert not list(folder.path.glob(".*")) and list(folder.missing(range(6))) == []


def test_clearing_spares_what_is_not_ours(folder):
    (folder.path / "notes.txt").touch()
    (folder.path / "manifest.json").touch()
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_manifest_accepts_the_same_and_lists_differences(tmp_path):
    settings = {"seed": 0, "model": "DiT-XL/2", "eta": 0.0}
    manifest.agree(tmp_path, settings)
    manifest.agree(tmp_path, dict(reversed(settings.items())))
    assert json.loads((tmp_path / "manifest.json").read_text()) == settings
    listed = (r"\(eta is 0.0 there, None now; extra is None there, 'x' now; "
              r"seed is 0 there, 1 now\)")
    with pytest.raises(UserError, match=listed):
        manifest.agree(tmp_path, {"seed": 1, "model": "DiT-XL/2", "extra": "x"})
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        manifest.agree(tmp_path, settings)


SOME_SETTINGS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2))


@given(SOME_SETTINGS, SOME_SETTINGS)
def test_fingerprints_are_equal_exactly_where_settings_are(a, b):
    same_fingerprint = manifest.fingerprint(a) == manifest.fingerprint(b)
    assert same_fingerprint == (a == b) == (not manifest.differences(a, b))


@pytest.mark.parametrize("first, second, allowed", [
    (None, None, False),
    (None, (0, 2), False),
    ((0, 2), None, False),
    ((0, 2), (0, 2), False),
    ((0, 2), (1, 2), True),
    ((0, 2), (1, 3), False),
])
def test_locks(tmp_path, first, second, allowed):
    with locked(tmp_path, first):
        if allowed:
            with locked(tmp_path, second):
                pass
        else:
            with pytest.raises(UserError, match="another run is writing"):
                with locked(tmp_path, second):
                    pass
    with locked(tmp_path, second):  # released
        pass


@given(st.integers(1, 100), st.integers(1, 12), st.integers(1, 5))
def test_shards_share_the_wanted_images_without_overlap(wanted, batch, shards):
    jobs = [
        SamplingJob(None, {}, wanted, batch, (k, shards), False, False, None)
        for k in range(shards)
    ]
    seen = []
    for job in jobs:
        for number in range(job.batches):
            if job.mine(number):
                seen.extend(job.images(number))
    assert sorted(seen) == list(range(wanted))
    for number in range(jobs[0].batches):
        assert set(jobs[0].images(number)) <= set(batch_indices(number, batch))


def test_the_writer_is_bounded_and_waits_at_the_end():
    running, gate, written = [], threading.Event(), []

    def save(index, _):
        running.append(index)
        gate.wait(10)
        written.append(index)
    with BackgroundWriter(save, batch=2) as writer:
        for index in range(2 * PENDING_BATCHES):
            writer.put(index, pixels(0))
        assert writer.waited < 0.5
        threading.Timer(0.3, gate.set).start()
        writer.put(99, pixels(0))
        assert writer.waited > 0.2
    assert sorted(written) == [*range(2 * PENDING_BATCHES), 99]


def test_an_error_of_the_writer_reaches_the_caller():
    def save(index, _):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        with BackgroundWriter(save, batch=1) as writer:
            for index in range(100):
                writer.put(index, pixels(0))
    with pytest.raises(OSError, match="No space"):
        with BackgroundWriter(save, batch=4) as writer:
            writer.put(0, pixels(0))


def test_waiting_ends_when_asked_to_stop():
    began = time.monotonic()
    with pytest.raises(Stopped):
        Ranks(0, 1, lambda: time.monotonic() - began > 0.2).wait(lambda: False)
