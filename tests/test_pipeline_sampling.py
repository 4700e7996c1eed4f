"""sample_merge_TAS.py on the folder of a pipeline: the images that diffusers draws, kill or not."""
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, error_line
from PIL import Image
from test_pipelines import BROKEN, UNET, WORDS, float_folder, folder_with  # noqa: F401
from test_survival import finish, images_of, launch, made, npz, wait_for_images

import QuantDiT
import sample_merge_TAS
from cli.call_arguments import read
from diffusion.noise import image_generators
from ditas.switching import backend_of, switch_backend
from files.npz import read_arrays
from quant.integer.cpu import supported

COUNT, BATCH = 10, 2
SEED = 5


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, float_folder) -> Path:  # noqa: F811
    """Quantise PixArt-Emoji with random weights, on two steps."""
    place = tmp_path_factory.mktemp("quantised")
    (place / "prompts.txt").write_text("\n".join(WORDS))
    with torch.no_grad():
        call(QuantDiT, "--model", float_folder, "--recipe", "rtn", "--num-sampling-steps", 2,
             "--prompts", place / "prompts.txt", "--output", place / "my-model", "--pipeline-args",
             '{"use_resolution_binning": false, "clean_caption": false}')
    return place / "my-model"


@pytest.fixture
def prompts(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(WORDS))
    return Path("prompts.txt")


def words(folder: Path, prompts: Path) -> tuple[str, ...]:
    return ("--path", str(folder), "--prompts", str(prompts), "--global-seed", str(SEED),
            "--per-proc-batch-size", str(BATCH), "--threads", "1", "--backend", "fake")


def drawn_by_diffusers(folder: Path, indices: range) -> np.ndarray:
    """Draw images with the pipeline itself; returns uint8 (N, H, W, 3)."""
    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(folder)
    switch_backend(pipeline.transformer, "fake")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [WORDS[index % len(WORDS)] for index in indices], num_inference_steps=2,
        generator=image_generators(SEED, indices), use_resolution_binning=False,
        clean_caption=False).images
    return np.stack([np.asarray(image) for image in images])


def test_the_folder_says_how_it_was_calibrated(quantised):
    assert read(quantised) == {
        "num_inference_steps": 2, "use_resolution_binning": False, "clean_caption": False}


def test_killed_runs_of_two_processes_complete_to_the_bytes_of_one(quantised, prompts):
    settings = words(quantised, prompts)
    call(sample_merge_TAS, *settings, "--num-fid-samples", COUNT, "--sample-dir", "one")
    whole = read_arrays(next(Path("one").glob("*.npz")))["arr_0"]
    assert whole.shape == (COUNT, 64, 64, 3)

    # Its images are those that diffusers draws, each of its own prompt and noise.
    second = range(BATCH, 2 * BATCH)
    assert np.array_equal(whole[second], drawn_by_diffusers(quantised, second))
    assert not np.array_equal(whole[0], whole[len(WORDS)])

    run = launch(Path("two"), processes=2, count=COUNT, settings=settings)
    wait_for_images(Path("two"), 1, run)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert 0 < made(Path("two")) < COUNT and not list(Path("two").glob("*.npz"))
    kept = sorted(images_of(Path("two")).glob("[0-9]*.png"))
    kept[-1].write_bytes(kept[-1].read_bytes()[:-20])
    finish(launch(Path("two"), processes=2, count=COUNT, settings=settings))
    assert npz(Path("two")) == npz(Path("one"))
    assert (images_of(Path("two")) / "samples.png").is_file()


def test_what_is_there_is_kept_and_other_settings_are_refused(quantised, prompts, capsys):
    flags = (*words(quantised, prompts), "--num-fid-samples")
    call(sample_merge_TAS, *flags, 2)
    first = next(Path("samples").glob("*/000000.png"))
    before = first.stat().st_mtime_ns
    call(sample_merge_TAS, *flags, 3)
    assert first.stat().st_mtime_ns == before
    whole = npz(Path("samples"))

    prompts.write_text("\n".join(reversed(WORDS)))
    line = error_line(capsys, lambda: call(sample_merge_TAS, *flags, 3))
    assert "holds images made with other settings (prompts_sha256 is " in line
    prompts.write_text("\n\n".join(WORDS))
    line = error_line(capsys, lambda: call(
        sample_merge_TAS, *flags, 3, "--pipeline-args", '{"negative_prompt": "lion"}'))
    assert "(arguments is " in line and "negative_prompt" in line
    next(Path("samples").glob("*.npz")).unlink()
    call(sample_merge_TAS, *flags, 3, "--assemble")
    assert npz(Path("samples")) == whole


def test_guidance_and_steps_reach_a_float_pipeline(float_folder, prompts):  # noqa: F811
    (float_folder / "call.json").write_text('{"use_resolution_binning": false}')
    call(sample_merge_TAS, "--path", float_folder, "--prompts", prompts, "--num-fid-samples", 1,
         "--per-proc-batch-size", 1, "--num-sampling-steps", 2, "--cfg-scale", "1.5")
    (float_folder / "call.json").unlink()
    folder = images_of(Path("samples"))
    assert folder.name == f"{float_folder.name}-cfg-1.5-steps-2-seed-0"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["backend"] == "float" and json.loads(manifest["arguments"]) == {
        "use_resolution_binning": False, "num_inference_steps": 2, "guidance_scale": 1.5}
    with Image.open(folder / "000000.png") as image:
        assert image.size == (64, 64)


@pytest.mark.skipif(not supported(), reason="no int8 instructions")
def test_a_loaded_model_switches_its_arithmetic(quantised):
    from diffusers import PixArtTransformer2DModel
    model = PixArtTransformer2DModel.from_pretrained(quantised / "transformer")
    linear = model.transformer_blocks[0].ff.net[2]
    x = torch.randn(1, 16, linear.in_features, generator=torch.Generator().manual_seed(0))
    switch_backend(model, "fake")
    simulated = linear(x)
    switch_backend(model, "integer")
    assert backend_of(model) == "integer"
    assert torch.allclose(linear(x), simulated, rtol=1e-4, atol=1e-4 * float(simulated.std()))
    switch_backend(model, "fake")
    assert backend_of(model) == "fake" and torch.equal(linear(x), simulated)


def test_noise_of_an_image_is_its_own():
    def draws(generators) -> torch.Tensor:
        return torch.stack([torch.randn(4, generator=generator) for generator in generators])

    together = draws(image_generators(3, range(6)))
    assert torch.equal(draws(image_generators(3, [5])), together[5:])
    everything = torch.cat([together, draws(image_generators(4, range(6)))])
    assert len(everything.unique(dim=0)) == 12


@pytest.mark.parametrize("index, argv, message", [
    (None, (), "'folder' holds no model_index.json that can be read"),
    (UNET, (), "'folder' is a StableDiffusionPipeline without a transformer"),
    (BROKEN, ("--prompts", "empty.txt"), "--prompts 'empty.txt' is empty"),
    (BROKEN, ("--pipeline-args", '{"prompt": "lion"}'), "gives 'prompt', which is ours to give"),
    (BROKEN, ("--num-sampling-steps", "ddim5"), "--num-sampling-steps ddim5 is no number"),
    (BROKEN, ("--sampler", "ddim"), "--sampler is for the models of this repository"),
    (BROKEN, ("--act-bit", "8"), "--act-bit is for the models of this repository"),
    (BROKEN, ("--no-fold",), "--fold is for the models of this repository"),
    (BROKEN, ("--shard", "3/3"), "bad --shard '3/3'"),
    (BROKEN, (), "cannot load the pipeline in 'folder'"),
])
def test_a_mistake_is_one_line(index, argv, message, prompts, capsys):
    Path("empty.txt").write_text("\n")
    folder = folder_with(index)
    line = error_line(capsys, lambda: call(sample_merge_TAS, "--path", folder, *argv))
    assert message in line and not Path("samples").exists()


def test_a_damaged_call_is_one_line(prompts, capsys):
    folder_with(BROKEN)
    Path("folder/call.json").write_text("[")
    line = error_line(capsys, lambda: call(sample_merge_TAS, "--path", "folder"))
    assert re.search(r"'folder/call\.json' is no JSON object", line)


@pytest.mark.parametrize("flag", ["--prompts", "--pipeline-args"])
def test_flags_of_pipelines_are_refused_where_nothing_reads_them(flag, prompts, capsys):
    line = error_line(capsys, lambda: call(
        sample_merge_TAS, "--model", "DiT-Digits", flag, "{}"))
    assert f"{flag} is for the folder of a diffusers pipeline" in line
