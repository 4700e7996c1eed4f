"""The comparison against the scripts it stands for, resuming, wrong command lines, fidelity."""
import csv
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, error_line
from torchvision.models import alexnet

import compare
import evaluate
from cards import DiT_models
from cli.quantize import QuantizedFile
from comparison import runner
from comparison.judging import find_lpips
from comparison.kept import KeptStep
from comparison.quantdit import parse_arguments
from comparison.rows import Row
from comparison.sampling import sample
from comparison.settings import table_settings
from diffusion import ddpm_step, make_schedule
from diffusion.generate import Sampling, generate_latents, labels_for
from download import load_decoder, load_model
from evaluation import fidelity
from evaluation.metrics import sqnr_db
from evaluation.networks import build_lpips
from files.npz import read_arrays
from quant import checkpoint

MODEL, STEPS, COUNT = "DiT-Digits-Outliers", 3, 12
ROW = "row-1.5.json"


def arguments(folder, *more):
    return [
        "--model", MODEL,
        "--recipes", "rtn", "ditas:lowrank=0,group-size=32",
        "--num-sampling-steps", str(STEPS),
        "--num-fid-samples", str(COUNT),
        "--per-proc-batch-size", "4",
        "--num-fidelity-samples", "6",
        "--nproc", "1",
        "--output", str(folder),
        *more]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    with torch.no_grad():
        call(compare, *arguments(folder / "out", "--report", folder / "report"))
    with open(folder / "out/table.csv") as file:
        return folder, list(csv.DictReader(file))


def row_folder(folder, name: str) -> Path:
    return folder / "out" / f"{MODEL}-16-{STEPS}" / name


def test_table_has_every_row_and_says_where_outliers_came_from(compared):
    folder, rows = compared
    assert [(row["recipe"], row["W/A"]) for row in rows] == [
        ("float", "32/32"), ("rtn", "4/8"), ("ditas:lowrank=0,group-size=32", "4/8")]
    assert all(row["N"] == str(COUNT) and row["steps"] == str(STEPS) for row in rows)
    assert all(row["LPIPS"] in ("-", "n/a") for row in rows)
    text = (folder / "out/table.md").read_text()
    assert "by construction" in text and text.count("\n| ") == 4 + 1
    # ditas keeps adaLN at 8 bits, rtn in floating point.
    assert float(rows[0]["MB"]) > float(rows[1]["MB"]) > float(rows[2]["MB"])


def test_scores_equal_those_of_evaluate(compared, capsys):
    folder, rows = compared
    names = ("float-W32A32", "rtn-W4A8", "ditas-lowrank=0-group-size=32-W4A8")
    notes = [json.loads((row_folder(folder, name) / ROW).read_text()) for name in names]
    files = [note["npz"] for note in notes]
    reference = folder / "out/digits-reference.npz"
    call(evaluate, reference, *files, "--features", "digits", "--json")
    for row, expected in zip(rows, json.loads(capsys.readouterr().out)):
        assert row["FID"] == f"{expected['fid']:.3f}"
        assert row["sFID"] == f"{expected['sfid']:.3f}"
        assert row["recall"] == f"{expected['recall']:.4f}"


def test_overrides_reach_the_checkpoint_and_sqnr_is_that_of_the_final_latents(compared):
    folder, rows = compared
    row = folder / "out" / f"{MODEL}-16-{STEPS}/ditas-lowrank=0-group-size=32-W4A8"
    header, quantised = checkpoint.load(row / "checkpoint.safetensors", folded=True)
    assert header.recipe.rank == 0 and header.recipe.weight_group == 32
    model = load_model(MODEL, DiT_models[MODEL], 16, 10, None, torch.device("cpu"))
    expected = sqnr_db(final_latents(model), final_latents(quantised))
    stored = json.loads((row / ROW).read_text())["fidelity"]["sqnr_db"][-1]
    assert stored == pytest.approx(expected, rel=1e-3)
    assert rows[2]["SQNR dB"] == f"{stored:.1f}"


def final_latents(model):
    """Sample the compared images in the comparison's batches.

    In others, codes near a rounding tie fall the other way.
    """
    latents, schedule = [], make_schedule(str(STEPS))
    for batch in (range(4), range(4, 6)):
        labels = labels_for(batch, 0, 10, None)
        latents.append(
            generate_latents(model, schedule, batch, labels, 0, 1.5, ddpm_step))
    return torch.cat(latents)


def test_report_shows_the_comparison_and_each_row(compared):
    folder, _ = compared
    page = (folder / "report/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "ditas:lowrank=0,group-size=32" in page
    reported = sorted(path.parent.name for path in folder.glob("report/*/*/report.html"))
    assert reported == ["ditas-lowrank=0-group-size=32-W4A8", "rtn-W4A8"]


def test_this_process_samples_what_two_processes_do(compared, tmp_path):
    folder, _ = compared
    path = row_folder(folder, "rtn-W4A8") / f"checkpoint{checkpoint.SUFFIX}"
    before = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    made = []
    for processes in (1, 2):
        sample(["--path", str(path), "--num-fid-samples", "6", "--per-proc-batch-size", "2",
                "--threads", "1", "--sample-dir", str(tmp_path / str(processes))], processes)
        made.append(next((tmp_path / str(processes)).glob("*.npz")).read_bytes())
    assert made[0] == made[1]
    assert (signal.getsignal(signal.SIGTERM), torch.get_num_threads()) == before


def test_several_guidance_scales_share_checkpoints_and_have_a_table_each(
        compared, monkeypatch, capsys):
    folder, rows = compared
    images = json.loads((row_folder(folder, "rtn-W4A8") / ROW).read_text())["npz"]
    sampled = []

    def sample(self, arguments, _):
        sampled.append(arguments)
        return Path(images)

    monkeypatch.setattr(runner, "quantize", lambda words: pytest.fail("quantised again"))
    monkeypatch.setattr(runner.Comparison, "sample", sample)
    call(compare, *arguments(folder / "out"), "--recipes", "rtn", "--cfg-scale", "1", "1.5")
    assert capsys.readouterr().out.count("done before") == 2
    with open(folder / "out/table.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["guidance"] for row in table] == ["1", "1", "1.5", "1.5"]
    assert table[2:] == rows[:2]
    assert table[1]["SQNR dB"] != rows[1]["SQNR dB"]
    assert table[0]["MB"] != table[0]["paper MB"]

    # Another sampler makes other images. Rows of guidance 1.5 are left to the tests that follow.
    call(compare, *arguments(folder / "out"), "--recipes", "rtn", "--cfg-scale", "1",
         "--sampler", "ddim")
    told = [(words[words.index("--sampler") + 1], words[words.index("--cfg-scale") + 1])
            for words in sampled]
    assert told == [("ddpm", "1.0")] * 2 + [("ddim", "1.0")] * 2


def test_finished_rows_are_kept_and_changed_settings_make_them_anew(compared, monkeypatch, capsys):
    folder, rows = compared
    again = arguments(folder / "out", "--report", folder / "report")
    quantised = []

    def quantize(words):
        quantised.append(parse_arguments(words).recipe)
        return QuantizedFile(Path(words[words.index("--output") + 1]), 0.0, None)

    def refuse(self, *_):
        pytest.fail("sampled again")

    monkeypatch.setattr(runner, "quantize", quantize)
    monkeypatch.setattr(runner.Comparison, "sample", refuse)
    call(compare, *again)
    with open(folder / "out/table.csv") as file:
        assert list(csv.DictReader(file)) == rows
    assert not quantised and capsys.readouterr().out.count("done before") == 3

    # Neither of these changes a checkpoint.
    for change in ("--global-seed", "--num-fid-samples"):
        with pytest.raises(pytest.fail.Exception, match="sampled again"):
            call(compare, *again, change, "13")
    assert not quantised

    sampled = json.loads(next(folder.glob(f"out/*/rtn-W4A8/{ROW}")).read_text())["npz"]
    monkeypatch.setattr(runner.Comparison, "sample", lambda self, *_: Path(sampled))
    call(compare, *arguments(folder / "out"), "--recipes", "rtn", "--seed", "1")
    assert quantised == ["rtn"]


def test_sampling_is_timed_without_the_first_call():
    model = load_model(MODEL, DiT_models[MODEL], 16, 10, None, torch.device("cpu"))
    calls, wait = [], 0.02

    def slow(*_):
        calls.append(None)
        time.sleep(1.0 if len(calls) == 1 else wait)

    model.register_forward_hook(slow)
    sampling = Sampling(make_schedule("4"), 0, 1.5, "ddpm")
    before = time.perf_counter()
    seconds = fidelity.seconds_to_sample(model, sampling, 2)
    assert len(calls) == 1 + 4
    assert 4 * wait <= seconds <= time.perf_counter() - before - 1.0


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"key": []}', "{}"])
def test_damaged_notes_mean_that_a_step_is_done_again(tmp_path, damage):
    result = tmp_path / "result"
    step = KeptStep(tmp_path / "note.json", ["settings"], [result])
    assert step.load() is None
    step.keep(seconds=1.5)
    assert step.load() is None  # without its result
    result.write_text("made")
    assert step.load() == {"seconds": 1.5, "key": ["settings"]}
    assert KeptStep(tmp_path / "note.json", ["other settings"], [result]).load() is None
    (tmp_path / "note.json").write_text(damage)
    assert step.load() is None


def test_notes_of_rows_keep_their_entries(compared):
    folder, _ = compared
    note = json.loads((row_folder(folder, "rtn-W4A8") / ROW).read_text())
    assert list(note) == [
        "label", "bits", "megabytes", "paper_megabytes", "seconds", "search_seconds",
        "seconds_per_image", "scores", "fidelity", "npz", "key"]
    row = Row.from_note(note)
    assert {**row.as_note(), "key": note["key"]} == note
    assert Row.from_note({**note, "more": 1}) is None
    assert Row.from_note({**note, "scores": {"fid": 1.0}}) is None


@pytest.mark.parametrize("change, expected", [
    (["--model", "DiT-None"], "unknown model 'DiT-None'"),
    (["--model", "DiT-None"], "or the folder or hub id of a diffusers pipeline"),
    (["--threads", "0"], "--threads 0 is too small"),
    (["--recipes", "none"], "--recipes none is not available"),
    (["--recipes", "ditas:rank"], "bad override 'rank'"),
    (["--recipes", "ditas:colour=red"], "bad override 'colour=red'"),
    (["--recipes", "ditas:weight-bit=8"], "bad override 'weight-bit=8'"),
    (["--recipes", "smoothquant:smooth-timestep=3"],
     "timestep index 3 is outside a trajectory of 3 steps"),
    (["--recipes", "ditas:class-labels=99"], "bad class labels '99'"),
    (["--recipes", "ditas:lowrank=-1"], "--lowrank -1 is too small"),
    (["--bits", "4/8"], "bad bit width '4/8'"),
    (["--bits", "W9A8"], "weight width 9"),
    (["--bits", "W4A3"], "activation width 3"),
    (["--image-size", "256"], "--image-size 256"),
    (["--num-sampling-steps", "0"], "0"),
    (["--num-fid-samples", "3"], "--num-fid-samples 3 is too small"),
    (["--cfg-scale", "0.5"], "--cfg-scale 0.5 is too small"),
    (["--cfg-scale", "1.5", "0"], "--cfg-scale 0.0 is too small"),
    (["--sampler", "ddim", "--eta", "1.5"], "--eta 1.5 is out of range"),
    (["--reference", "a.npz", "b.npz"], "--reference has 2 files"),
    (["--reference", "missing.npz"], "'missing.npz' does not exist"),
    (["--reference", "large.npz"],
     "'large.npz' holds images of 32x32 pixels: features digits need 16x16"),
])
def test_wrong_command_lines(tmp_path, monkeypatch, capsys, change, expected):
    monkeypatch.chdir(tmp_path)
    np.savez("large.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    line = error_line(capsys, lambda: call(compare, *arguments(tmp_path / "out"), *change))
    assert expected in line and not list(tmp_path.glob("out/*/*"))


def test_a_model_without_bundled_data_needs_a_reference(tmp_path, capsys):
    line = error_line(capsys, lambda: call(compare, "--model", "DiT-S/8", "--output", tmp_path))
    assert "--reference is missing" in line and "VIRTUAL_imagenet256_labeled.npz" in line


def digits_run(model, count=5, batch=2):
    decode = load_decoder(DiT_models["DiT-Digits"], "ema", torch.device("cpu"))
    labels = [1, 2, 3, 4, 5][:count]
    return fidelity.sample_run(model, decode, Sampling(make_schedule("4"), 0, 1.5), labels, batch)


def test_fidelity_of_a_model_to_itself_is_infinite_and_of_a_changed_one_per_step():
    card = DiT_models["DiT-Digits"]
    model = load_model("DiT-Digits", card, 16, 10, None, torch.device("cpu"))
    one = digits_run(model)
    assert one.latents.shape == (4, 5, 4, 8, 8) and one.images.shape == (5, 16, 16, 3)
    same = fidelity.compare_runs(one, digits_run(model))
    assert same == fidelity.Fidelity([float("inf")] * 4, float("inf"), float("inf"), None)

    weight = model.blocks[0].mlp.fc1.weight
    weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    other = digits_run(model)
    measured = fidelity.compare_runs(one, other)
    a, b = one.latents.double().numpy(), other.latents.double().numpy()
    expected = [
        10 * np.log10((a[i] ** 2).sum() / ((a[i] - b[i]) ** 2).sum())
        for i in range(4)
    ]
    assert measured.sqnr_db == pytest.approx(expected)
    signals, errors = ((x[-1] ** 2).sum((1, 2, 3)) for x in (a, a - b))
    assert measured.image_sqnr_db == pytest.approx(np.mean(10 * np.log10(signals / errors)))
    mse = np.mean((one.images.astype(float) - other.images.astype(float)) ** 2)
    assert measured.psnr_db == pytest.approx(20 * np.log10(255 / np.sqrt(mse)))


def test_lpips_is_left_out_where_its_weights_are_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluation.networks.FOLDER", tmp_path)
    assert find_lpips(64, torch.device("cpu")) is None
    message = capsys.readouterr().err
    assert message.startswith(f"LPIPS is n/a: '{tmp_path}/alexnet-owt-7be5be79.pth' is not there")
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in message


def test_lpips_runs_on_the_trunk_it_is_given():
    torch.manual_seed(0)
    trunk = alexnet(weights=None).eval()
    model = build_lpips(trunk.state_dict())
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    # AlexNet's fifth ReLU.
    torch.testing.assert_close(model.net(x).relu5, trunk.features[:12](x))

    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    reversed_images = images[::-1].copy()
    runs = [
        fidelity.Run(torch.ones(1, 3, 1), pixels)
        for pixels in (images, reversed_images)
    ]
    assert fidelity.compare_runs(runs[0], runs[0], model).lpips == pytest.approx(0, abs=1e-7)
    pair = [torch.tensor(run.images).permute(0, 3, 1, 2) / 127.5 - 1 for run in runs]
    expected = float(model(*pair).mean())
    assert fidelity.compare_runs(*runs, model, batch=2).lpips == pytest.approx(expected, rel=1e-5)


def test_npz_of_a_row_holds_its_images(compared):
    folder, _ = compared
    files = list((folder / "out").glob("*/*/samples-*/*.npz"))
    assert len(files) == 3
    assert all(read_arrays(file)["arr_0"].shape == (COUNT, 16, 16, 3) for file in files)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="there is no affinity")
def test_processes_and_threads_are_those_of_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    settings = table_settings(compare.make_parser().parse_args([]))
    assert (settings["nproc"], settings["threads"]) == (6, 1)
    settings = table_settings(compare.make_parser().parse_args(["--nproc", "2"]))
    assert (settings["nproc"], settings["threads"]) == (2, 3)
