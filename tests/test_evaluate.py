"""evaluate.py from files to numbers, and files that are refused."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call

import evaluate
import evaluation.scores
from evaluation.features import Extractor
from evaluation.metrics import frechet_distance, inception_score, precision_recall, statistics
from examples.digits.classifier import load_classifier
from files.npz import read_arrays

ROOT = Path(__file__).parents[1]
UNIT = {"mu": np.zeros(64), "sigma": np.eye(64), "mu_s": np.zeros(112), "sigma_s": np.eye(112)}
KEYS = ("n", "fid", "sfid", "inception_score", "precision", "recall")


def random_images(seed: int, count: int = 40, size: int = 16, low: int = 0) -> np.ndarray:
    shape = (count, size, size, 3)
    return np.random.default_rng(seed).integers(low, 256, shape, dtype=np.uint8)


def seen(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read pool features, spatial features and logits off the layers of the digits classifier."""
    model = load_classifier()
    maps = model.spatial(torch.tensor(images[:, None, :, :, 0] / 127.5 - 1, dtype=torch.float32))
    spatial = np.moveaxis(maps.numpy()[:, :7], 1, 3).reshape(len(images), -1)
    pool = model.pooled(maps)
    logits = model.head(pool) - model.head.bias
    return pool.numpy(), spatial, logits.numpy()


def given_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    pool, spatial, _ = seen(images)
    return {
        "mu": pool.mean(0),
        "sigma": np.cov(pool.T),
        "mu_s": spatial.mean(0),
        "sigma_s": np.cov(spatial.T),
    }


def judge(*argv) -> None:
    call(evaluate, "--features", "digits", *argv)


def table(capsys, *argv) -> list[list[str]]:
    judge(*argv)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def scores(capsys, *argv) -> list[dict]:
    judge(*argv, "--json")
    return json.loads(capsys.readouterr().out)


def messages(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line and not line.startswith("features of ")]


def fails(capsys, *argv) -> str:
    """Run a wrong command line; returns its one line."""
    before = set(Path.cwd().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        judge(*argv)
    printed = capsys.readouterr()
    assert (caught.value.code, printed.out, len(messages(printed.err))) == (2, "", 1), printed.err
    assert set(Path.cwd().rglob("*")) == before
    return messages(printed.err)[0]


@pytest.fixture(autouse=True)
def _in_a_folder_with_two_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", arr_0=random_images(0, 50))
    np.savez("made.npz", arr_0=random_images(1, low=20))


def saved(**arrays):
    return lambda: np.savez("bad.npz", **arrays)


def flipped(mask: int, position: int = 0, after: bytes = b"", save=np.savez):
    """Write images of which one byte is changed."""
    def write():
        save("bad.npz", arr_0=random_images(2))
        raw = bytearray(Path("bad.npz").read_bytes())
        raw[raw.index(after) + position] ^= mask
        Path("bad.npz").write_bytes(raw)
    return write


BAD_FILES = {
    "no arr_0": (saved(images=random_images(2)), "'bad.npz' holds no 'arr_0' (it has images)"),
    "dtype": (
        saved(arr_0=random_images(2).astype(np.float32)),
        "is float32 (40, 16, 16, 3): expected uint8 images"),
    "grey": (
        saved(arr_0=random_images(2)[..., :1]),
        "(40, 16, 16, 1): expected uint8 images (N, H, W, 3)"),
    "one image without N": (
        saved(arr_0=random_images(2)[0]),
        "(16, 16, 3): expected uint8 images"),
    "empty": (
        saved(arr_0=random_images(2)[:0]),
        "(0, 16, 16, 3): expected uint8 images (N, H, W, 3), at least one"),
    "single image": (saved(arr_0=random_images(2)[:1]), "at least 2 images, got 1"),
    "few images": (saved(arr_0=random_images(2)[:3]), "at least 4 images, got 3"),
    "other size than the classifier's": (
        saved(arr_0=random_images(2, size=32)),
        "of 32x32 pixels: features digits need 16x16"),
    "missing": (lambda: None, "'bad.npz' does not exist"),
    "no zip": (
        lambda: Path("bad.npz").write_text("hello"),
        "cannot read 'bad.npz' (File is not a zip file)"),
    "truncated": (
        lambda: Path("bad.npz").write_bytes(Path("made.npz").read_bytes()[:-1000]),
        "cannot read 'bad.npz'"),
    "flipped pixel": (flipped(255, 5000), "wrong checksum"),
    "flipped header": (flipped(255, 30, after=b"NUMPY"), "cannot read 'bad.npz'"),
    "flipped when compressed": (
        flipped(255, 5000, save=np.savez_compressed),
        "cannot read 'bad.npz'"),
    "not deflated": (
        flipped(6, len("arr_0.npy") + 20, after=b"arr_0.npy", save=np.savez_compressed),
        "cannot read 'bad.npz'"),
    "encrypted": (flipped(1, 8, after=b"PK\x01\x02"), "cannot read 'bad.npz'"),
    "wider statistics": (
        saved(**{**UNIT, "mu": np.zeros(65), "sigma": np.eye(65)}),
        "(65,) and (65, 65): expected width 64"),
    "wrong sigma_s": (
        saved(**{**UNIT, "sigma_s": np.eye(111)}),
        "'sigma_s' of 'bad.npz' are (112,) and (111, 111): expected width 112"),
    "some statistics": (
        saved(arr_0=random_images(2), mu=np.zeros(64), sigma=np.eye(64)),
        "holds mu, sigma only"),
    "NaN statistics": (saved(**{**UNIT, "mu": np.full(64, np.nan)}), "NaN or infinity"),
}


@pytest.mark.parametrize(
    "order",
    [("bad.npz", "made.npz"), ("real.npz", "made.npz", "bad.npz")],
    ids=["reference", "samples"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(capsys, case, order):
    write, message = BAD_FILES[case]
    write()
    assert message in fails(capsys, *order)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pickled_objects_do_not_run(capsys, tmp_path, save):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    save("evil.npz", arr_0=np.array([Evil()], dtype=object))
    assert "cannot read 'evil.npz'" in fails(capsys, "real.npz", "evil.npz")
    assert not (tmp_path / "ran").exists()


def test_different_resolutions_are_refused(capsys, monkeypatch):
    def moments(x):
        both = torch.stack([x.float().mean((1, 2, 3)), x.float().std((1, 2, 3))], 1)
        return both, both, both

    anything = Extractor("moments", (2, 2, 2), moments, torch.device("cpu"))
    monkeypatch.setattr("cli.evaluate.load_extractor", lambda *_: anything)
    np.savez("large.npz", arr_0=random_images(2, size=24))
    line = fails(capsys, "real.npz", "large.npz")
    assert "'real.npz' are 16x16, those of 'large.npz' 24x24" in line


@pytest.mark.parametrize("argv, message", [
    (["--batch-size", "0"], "--batch-size 0 is too small"),
    (["--features", "vgg"], "invalid choice: 'vgg'"),
    (["--features", "inception", "--inception", "none.pth"], "'none.pth' do not exist"),
    (["--features", "inception", "--inception", "real.npz"], "expected 6726825d0af5f729"),
])
def test_bad_flags_are_refused(capsys, argv, message):
    assert message in fails(capsys, "real.npz", "made.npz", *argv)


@pytest.mark.parametrize("half", [False, True])
def test_scores_are_the_metrics_of_what_the_network_sees(capsys, half):
    pool, spatial, _ = seen(np.load("real.npz")["arr_0"])
    made_pool, made_spatial, logits = seen(np.load("made.npz")["arr_0"])
    fid = frechet_distance(statistics(pool), statistics(made_pool))
    sfid = frechet_distance(statistics(spatial), statistics(made_spatial))
    precision, recall = precision_recall(pool, made_pool, half)
    assert precision != recall
    expected = (40, fid, sfid, inception_score(logits), precision, recall)

    flags = ["--pr-dtype", "float16" if half else "float32", "--batch-size", "7"]
    (entry,) = scores(capsys, "real.npz", "made.npz", *flags)
    assert [entry[key] for key in KEYS] == pytest.approx(expected, rel=1e-4)
    assert entry["reference"] == "real.npz"
    assert entry["samples"] == "made.npz"
    assert entry["features"] == "digits"


def test_float16_is_handed_on(capsys, monkeypatch):
    def show_half(real, made, half, device):
        return float(half), 0.5

    monkeypatch.setattr(evaluation.scores, "precision_recall", show_half)
    assert table(capsys, "real.npz", "made.npz")[0][5] == "0.0000"
    assert table(capsys, "real.npz", "made.npz", "--pr-dtype", "float16")[0][5] == "1.0000"


def test_json_and_table_agree_for_several_samples(capsys):
    names = ("made.npz", "real.npz")
    rows = table(capsys, "real.npz", *names)
    entries = scores(capsys, "real.npz", *names)
    assert [row[0] for row in rows] == list(names)
    assert [entry["samples"] for entry in entries] == list(names)
    for row, entry in zip(rows, entries):
        shown = [float(cell) for cell in row[1:]]
        assert shown == pytest.approx([entry[key] for key in KEYS], abs=0.00501)
    assert rows[1][1:4] == ["50", "0.000", "0.000"]
    assert rows[1][5:] == ["1.0000", "1.0000"]
    judge("real.npz", "made.npz")
    assert "fewer images than the 64 features" in capsys.readouterr().out


def test_a_file_given_twice_has_two_rows(capsys):
    rows = table(capsys, "real.npz", "made.npz", "made.npz")
    assert len(rows) == 2 and rows[0] == rows[1]
    assert len(scores(capsys, "real.npz", "made.npz", "made.npz")) == 2


def test_a_reference_may_hold_statistics_only(capsys):
    np.savez("numbers.npz", **given_statistics(np.load("real.npz")["arr_0"]))
    (row,) = table(capsys, "numbers.npz", "made.npz")
    (full,) = table(capsys, "real.npz", "made.npz")
    assert row[5:] == ["n/a", "n/a"] and row[1:5] == full[1:5]
    (numbers,) = table(capsys, "real.npz", "numbers.npz")
    assert numbers == ["numbers.npz", "n/a", "0.000", "0.000", "n/a", "n/a", "n/a"]


def test_statistics_take_precedence_over_images(capsys):
    images, others = np.load("real.npz")["arr_0"], random_images(5, low=40)
    np.savez("both.npz", arr_0=images, **given_statistics(others))
    np.savez("others.npz", arr_0=others)
    (both,) = table(capsys, "both.npz", "made.npz")
    (real,) = table(capsys, "real.npz", "made.npz")
    (other,) = table(capsys, "others.npz", "made.npz")
    assert both[2:4] == other[2:4] != real[2:4] and both[5:] == real[5:] != other[5:]


def test_compressed_files_are_read_the_same(capsys):
    np.savez_compressed("small.npz", arr_0=np.load("made.npz")["arr_0"])
    (plain,) = scores(capsys, "real.npz", "made.npz")
    (small,) = scores(capsys, "real.npz", "small.npz")
    assert [plain[key] for key in KEYS] == [small[key] for key in KEYS]


def test_cached_features_serve_as_long_as_the_images_are_the_same(capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("extracts features")

    first = scores(capsys, "real.npz", "made.npz", "--cache")
    assert {path.name for path in Path.cwd().iterdir()} == {
        "real.npz", "made.npz", "real.features-digits.npz", "made.features-digits.npz"}
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.features, "extract", refuse)
        assert scores(capsys, "real.npz", "made.npz", "--cache") == first
        np.savez("made.npz", arr_0=random_images(3, low=30))
        for flags in (["--cache"], []):
            with pytest.raises(AssertionError, match="extracts features"):
                judge("real.npz", "made.npz", *flags)
    new = scores(capsys, "real.npz", "made.npz")
    assert new != first
    for _ in ("made anew", "kept"):
        assert scores(capsys, "real.npz", "made.npz", "--cache") == new


def test_features_files_that_do_not_fit_are_refused(capsys):
    judge("real.npz", "made.npz", "--cache")
    path = Path("made.features-digits.npz")
    arrays = dict(np.load(path))
    raw = path.read_bytes()
    for name in ("pool", "spatial", "logits"):
        np.savez(path, **{**arrays, name: arrays[name][:, 1:]})
        line = fails(capsys, "real.npz", "made.npz", "--cache")
        assert f"does not fit ('{name}' is (40, " in line
    flipped_bit = raw[:3000] + bytes([raw[3000] ^ 1]) + raw[3001:]
    for damaged in (raw[:-500], flipped_bit, b""):
        path.write_bytes(damaged)
        assert "delete it" in fails(capsys, "real.npz", "made.npz", "--cache")


def test_a_real_process_prints_nothing_but_the_table_and_progress():
    judge("real.npz", "made.npz", "--cache")
    script = [sys.executable, ROOT / "evaluate.py", "--features", "digits"]
    right = [*script, "real.npz", "made.npz", "--cache"]
    done = subprocess.run(right, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout
    assert messages(done.stderr) == [], done.stderr

    wrong = [*script, "real.npz", "none.npz"]
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert [line[:19] for line in messages(done.stderr)] == ["evaluate.py: error:"], done.stderr


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(save):
    rng = np.random.default_rng(0)
    arrays = {
        "scalar": np.float64(3),
        "empty": np.empty((0, 7), np.int16),
        "row": np.arange(5),
        "fields": np.zeros(2, "i4,f8"),
    }
    for dtype in ("u1", "<i8", ">i4", "<f2", "<f4", "<f8", "?", "<c16", "<U5"):
        for order in "CF":
            values = rng.uniform(0, 100, (3, 4, 5)).astype(dtype)
            arrays[f"{dtype}{order}"] = values.copy(order)
    save("arrays.npz", **arrays)
    arrays_read = read_arrays(Path("arrays.npz"))
    expected = np.load("arrays.npz")
    assert set(arrays_read) == set(expected)
    for name, array in expected.items():
        read = arrays_read[name]
        assert np.array_equal(read, array)
        assert read.dtype == array.dtype and read.shape == array.shape
        assert read.flags.f_contiguous == array.flags.f_contiguous
        assert isinstance(read, np.memmap) == (save is np.savez and name != "empty")
