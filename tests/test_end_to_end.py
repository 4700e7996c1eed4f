"""Whole runs of the two scripts, as a user starts them."""
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, error_line, random_model
from PIL import Image
from test_download import tiny_vae

import cli.quantize
import QuantDiT
import sample_merge_TAS
from quant import checkpoint
from quant.integer.cpu import supported

ROOT = Path(__file__).parents[1]


def script(name: str, *argv, cwd: Path, processes: int | None = None) -> str:
    """A real process, or torchrun with several."""
    launcher = []
    if processes is not None:
        launcher = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, ROOT / name, *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Run ``QuantDiT.py`` with its defaults on the digits model.

    Returns its folder and what it printed.
    """
    folder = tmp_path_factory.mktemp("run")
    command = ("--model", "DiT-Digits", "--num-sampling-steps", 10)
    return folder, script("QuantDiT.py", *command, cwd=folder)


def test_quantdit_writes_what_it_says(quantised):
    folder, printed = quantised
    name = "DiT-Digits-16-W4A8-ditas"
    written = sorted(path.name for path in (folder / "results").iterdir())
    assert written == [f"{name}.png", f"{name}.safetensors"]
    assert f"wrote results/{name}.safetensors" in printed
    assert "sample_merge_TAS.py" in printed and f"--path results/{name}.safetensors" in printed
    image = Image.open(folder / f"results/{name}.png")
    picture = np.asarray(image.convert("L"), dtype=float)
    half = (picture.shape[1] - 16) // 2
    left, right = picture[20:, :half], picture[20:, -half:]
    # The same digits, not a blank canvas.
    assert left.std() > 40 and np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.9


def test_the_time_of_every_stage_is_printed_when_it_ends(quantised):
    _, printed = quantised
    lines = printed.splitlines()
    stages = [line.split(":")[0] for line in lines if re.fullmatch(r"[a-z ]+: \d+\.\d s", line)]
    assert stages == ["load", "quantise", "save", "float samples", "quantised samples", "decode"]
    order = [line.split(":")[0].split(" (")[0] for line in lines]
    wrote = f"wrote results/DiT-Digits-16-W4A8-ditas{checkpoint.SUFFIX}"
    assert order.index("save") < order.index(wrote) < order.index("float samples")
    assert lines[-1].startswith("next: ")


def test_one_model_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Peak memory of the whole command stays that of quantising."""
    monkeypatch.chdir(tmp_path)
    loaded = {}
    lives = {}

    def watch(name: str, later: str) -> None:
        load = getattr(cli.quantize, name)

        def watched(*arguments):
            lives[later] = [other for other, model in loaded.items() if model() is not None]
            model = load(*arguments)
            loaded[name] = weakref.ref(model)
            return model
        monkeypatch.setattr(cli.quantize, name, watched)

    watch("load_float", "at the float model")
    watch("load_quantised", "at the quantised model")
    decode = cli.quantize.decode_pair

    def decode_pair(*arguments):
        lives["when decoding"] = [name for name, model in loaded.items() if model() is not None]
        return decode(*arguments)

    monkeypatch.setattr(cli.quantize, "decode_pair", decode_pair)
    call(QuantDiT, "--model", "DiT-Digits", "--num-sampling-steps", 2, "--report", "report")
    assert lives == {
        "at the float model": [],
        "at the quantised model": [],
        "when decoding": [],
    }


def npz(folder: Path) -> bytes:
    found = list(folder.glob("*.npz"))
    assert len(found) == 1
    return found[0].read_bytes()


def test_images_are_the_same_bytes_for_any_number_of_processes(quantised):
    folder, _ = quantised
    command = ("--path", "results/DiT-Digits-16-W4A8-ditas", "--num-fid-samples", 20,
               "--per-proc-batch-size", 8, "--threads", 1)
    runs = {}
    for processes in (None, 2):
        out = folder / f"samples-{processes}"
        printed = script("sample_merge_TAS.py", *command, "--sample-dir", out, cwd=folder,
                         processes=processes)
        stages = re.findall(r"^([a-z]+): \d+\.\d s$", printed, re.MULTILINE)
        assert stages == ["load", "sample"]  # one of the processes says so
        runs[processes] = npz(out)
        images = next(path for path in out.iterdir() if path.is_dir())
        written = sorted(path.name for path in images.iterdir())
        numbered = [f"{i:06d}.png" for i in range(20)]
        assert written == [".lock", *numbered, "manifest.json", "samples.png"]
    assert runs[None] == runs[2]
    arrays = np.load(next((folder / "samples-2").glob("*.npz")))["arr_0"]
    assert arrays.shape == (20, 16, 16, 3) and arrays.dtype == np.uint8
    first = next(path for path in (folder / "samples-2").iterdir() if path.is_dir())
    for i in range(20):
        assert np.array_equal(np.asarray(Image.open(first / f"{i:06d}.png")), arrays[i])
    assert np.array_equal(arrays[..., 0], arrays[..., 2]) and arrays.std() > 40


def test_unfolded_and_float_sampling(quantised, monkeypatch):
    folder, _ = quantised
    monkeypatch.chdir(folder)
    path, images = ("--path", "results/DiT-Digits-16-W4A8-ditas"), {}
    float_model = ("--model", "DiT-Digits")
    commands = {
        "folded": path,
        "unfolded": (*path, "--no-fold"),
        "float": (*float_model, "--num-sampling-steps", 10),
        "ddim": (*float_model, "--sampler", "ddim", "--num-sampling-steps", "ddim10"),
    }
    for key, argv in commands.items():
        call(sample_merge_TAS, *argv, "--num-fid-samples", 8, "--per-proc-batch-size", 8,
             "--sample-dir", key, "--class-labels", "3,5", "--threads", 1)
        images[key] = np.load(next((folder / key).glob("*.npz")))["arr_0"].astype(float)
    # Codes may flip where float32 rounds differently.
    assert np.abs(images["folded"] - images["unfolded"]).mean() < 1
    assert 0 < np.abs(images["folded"] - images["float"]).mean() < 20
    assert images["ddim"].std() > 40


def test_integer_arithmetic_makes_the_same_images(quantised, monkeypatch):
    folder, _ = quantised
    monkeypatch.chdir(folder)
    images, settings = {}, {}
    commands = {
        "fake": ("--backend", "fake"),
        "integer": ("--backend", "integer"),
        "packed": ("--backend", "integer", "--cpu-weights", "packed"),
        "bfloat16": ("--backend", "integer", "--dtype", "bfloat16"),
    }
    for key, argv in commands.items():
        call(sample_merge_TAS, "--path", "results/DiT-Digits-16-W4A8-ditas", *argv,
             "--num-sampling-steps", 50, "--num-fid-samples", 16, "--per-proc-batch-size", 16,
             "--sample-dir", f"backend-{key}", "--threads", 1)
        images[key] = np.load(next((folder / f"backend-{key}").glob("*.npz")))["arr_0"].astype(int)
        manifest = next((folder / f"backend-{key}").glob("*/manifest.json"))
        settings[key] = json.loads(manifest.read_text())
    assert (np.abs(images["integer"] - images["fake"]) <= 1).mean() >= 0.999
    assert np.array_equal(images["integer"], images["packed"])
    assert 0 < np.abs(images["bfloat16"] - images["fake"]).mean() < 5
    backends = [settings[key]["backend"] for key in images]
    taken = "integer" if supported() else "fake"
    assert backends == ["fake", taken, taken, taken]
    dtypes = [settings[key]["dtype"] for key in images]
    assert dtypes == ["float32", "float32", "float32", "bfloat16"]


@pytest.mark.parametrize("backend", ["fake", "integer"])
def test_auto_goes_on_with_the_backend_of_the_images_that_are_there(
    backend, quantised, monkeypatch,
):
    """Measured anew, it could come out the other way, and the run would refuse to continue."""
    folder, _ = quantised
    monkeypatch.chdir(folder)
    monkeypatch.setattr("quant.integer.cpu.supported", lambda: True)
    for count, flag in ((2, backend), (4, "auto")):
        call(sample_merge_TAS, "--path", "results/DiT-Digits-16-W4A8-ditas", "--backend", flag,
             "--num-sampling-steps", 2, "--num-fid-samples", count, "--per-proc-batch-size", 2,
             "--sample-dir", f"auto-{backend}", "--threads", 1)
    place = next((folder / f"auto-{backend}").glob("*.npz")).with_suffix("")
    assert json.loads((place / "manifest.json").read_text())["backend"] == backend
    assert len(list(place.glob("00*.png"))) == 4


def test_a_processor_without_int8_does_not_go_on_with_integers(quantised, monkeypatch, capsys):
    folder, _ = quantised
    monkeypatch.chdir(folder)
    argv = ("--path", "results/DiT-Digits-16-W4A8-ditas", "--num-sampling-steps", 2,
            "--num-fid-samples", 2, "--per-proc-batch-size", 2, "--sample-dir", "elsewhere",
            "--threads", 1)
    monkeypatch.setattr("quant.integer.cpu.supported", lambda: True)
    call(sample_merge_TAS, *argv, "--backend", "integer")
    monkeypatch.setattr("quant.integer.cpu.supported", lambda: False)
    line = error_line(capsys, lambda: call(sample_merge_TAS, *argv))
    assert "backend is 'integer' there, 'fake' now" in line


def test_the_published_path_on_a_registered_imagenet_model(tmp_path, monkeypatch):
    """Run the XL/2 command lines with a smaller sister.

    Random weights and a small VAE are where the downloads would be.
    """
    model = random_model(input_size=32, patch_size=8, hidden_size=384, depth=12, num_heads=6,
                         num_classes=1000)
    torch.save({"ema": model.state_dict()}, tmp_path / "weights.pt")
    tiny_vae().save_pretrained(tmp_path / "pretrained_models" / "sd-vae-ft-mse")
    common = ("--image-size", 256, "--model", "DiT-S/8", "--act-bit", 8, "--weight-bit", 4,
              "--num-sampling-steps", 2, "--vae", "mse")
    monkeypatch.chdir(tmp_path)
    call(QuantDiT, *common, "--seed", 1, "--ckpt", "weights.pt")
    path = tmp_path / "results" / "DiT-S-8-256-W4A8-ditas"
    float_bytes = (tmp_path / "weights.pt").stat().st_size
    assert path.with_suffix(".safetensors").stat().st_size < 0.7 * float_bytes
    script("sample_merge_TAS.py", *common, "--num-fid-samples", 3, "--per-proc-batch-size", 2,
           "--path", path, cwd=tmp_path, processes=1)
    images = np.load(next((tmp_path / "samples").glob("*.npz")))["arr_0"]
    assert images.shape == (3, 256, 256, 3)
