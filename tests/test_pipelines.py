"""QuantDiT.py on the folder of a pipeline: a quantised folder, or one line."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, error_line
from test_hand_over import emoji_pipeline

import ditas
import QuantDiT
from cli import pipelines
from cli.call_arguments import call_arguments, write
from cli.pipelines import PROMPTS, prompts_file, read_prompts, repeated
from cli.quantize_flags import make_parser
from examples.emoji import pixart

WORDS = ["red apple", "lion", "face"]
# Without what is for models of 256 pixels and captions from the web.
PLAIN = {"use_resolution_binning": False, "clean_caption": False}
FLAGS = ("--num-sampling-steps", "2", "--recipe", "smoothquant", "--pipeline-args",
         json.dumps(PLAIN))


def name_the_tokenizer(folder: Path, name: str = "tokenizer") -> None:
    """Give a tokenizer's class, if it is there, the name that all versions of transformers know."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    if name in index:
        index[name] = ["transformers", "PreTrainedTokenizerFast"]
    path.write_text(json.dumps(index))


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "emoji"
    emoji_pipeline().save_pretrained(folder)
    name_the_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n\n".join(WORDS) + "\n")


def test_a_folder_becomes_a_quantised_folder(float_folder, capsys):
    call(QuantDiT, "--model", str(float_folder), "--prompts", "prompts.txt", *FLAGS,
         "--output", "made/quantised")
    printed = capsys.readouterr().out
    assert "| transformer_blocks.*.ff.net.2 | 7 | W4A8 | at run time |" in printed
    assert "next, in Python: import ditas" in printed
    # Sampling goes on with what was calibrated on.
    assert read_prompts(prompts_file(None, Path("made/quantised"))) == tuple(WORDS)
    assert [path.name for path in Path("made").iterdir()] == ["quantised"]
    name_the_tokenizer(Path("made/quantised"))
    images = pixart.draw_prompts(pixart.load_pipeline(Path("made/quantised")), WORDS, steps=2)

    # The same from Python.
    pipeline = pixart.load_pipeline(float_folder)
    pipeline.set_progress_bar_config(disable=True)
    ditas.quantize(
        pipeline.transformer, lambda: pixart.draw_prompts(pipeline, WORDS, steps=2), "smoothquant")
    assert np.array_equal(pixart.draw_prompts(pipeline, WORDS, steps=2), images)


def test_our_own_prompts_are_thirty_two():
    prompts = read_prompts(PROMPTS)
    assert len(set(prompts)) == len(prompts) == 32


def test_images_take_the_prompts_in_turn():
    assert repeated(("a", "b", "c"), None) == ("a", "b", "c")
    assert repeated(("a", "b", "c"), 2) == ("a", "b")
    assert repeated(("a", "b", "c"), 7) == ("a", "b", "c", "a", "b", "c", "a")


def test_prompts_are_the_given_ones_then_the_folders_then_our_own():
    folder = Path("folder")
    folder.mkdir()
    assert prompts_file(None, folder) == PROMPTS
    (folder / "prompts.txt").write_text("lion")
    assert prompts_file(None, folder) == folder / "prompts.txt"
    assert prompts_file("given.txt", folder) == Path("given.txt")


@pytest.mark.parametrize("given, own, kept", [
    ("prompts.txt", "lion", tuple(WORDS)),
    ("prompts.txt", None, tuple(WORDS)),
    (None, "lion", ("lion",)),
    # Sampling finds our own by itself.
    (None, None, ()),
])
def test_the_prompts_of_a_folder_are_those_that_were_calibrated_on(given, own, kept):
    folder = folder_with(BROKEN)
    if own is not None:
        Path(folder, "prompts.txt").write_text(own)
    argv = [] if given is None else ["--prompts", given]
    # How many images calibration makes changes none of them.
    args = make_parser().parse_args(["--model", folder, "--calibration-images", "7", *argv])
    settings = pipelines.pipeline_settings(args)
    assert settings.kept_prompts == kept
    Path("written").mkdir()
    pipelines.write_prompts(Path("written"), settings.kept_prompts)
    if kept:
        assert read_prompts(prompts_file(None, Path("written"))) == kept
    assert prompts_file(None, Path("written")) == (
        Path("written/prompts.txt") if kept else PROMPTS)


@pytest.mark.parametrize("model, argv, name", [
    ("folder", (), "folder-W4A8-ditas"),
    (".", ("--weight-bit", "3"), "folder-W3A8-ditas"),
    ("../folder/", ("--recipe", "rtn", "--act-granularity", "token"),
     "folder-W4A8-rtn-act-granularity=token"),
    ("folder", ("--lowrank", "0", "--alpha", "0.5"), "folder-W4A8-ditas-alpha=0.5-lowrank=0"),
])
def test_the_default_folder_says_what_was_done(monkeypatch, model, argv, name):
    folder = folder_with(BROKEN)
    if model != "folder":
        monkeypatch.chdir(folder)
    args = make_parser().parse_args(["--model", model, *argv])
    assert pipelines.pipeline_settings(args).output == Path("results") / name


def test_arguments_of_a_call_json_over_flags_over_folder(tmp_path):
    write(tmp_path, {"height": 8, "width": 8, "guidance_scale": 2.0})
    arguments = call_arguments(
        tmp_path, '{"height": 32}', height=16, guidance_scale=3.0, num_inference_steps=None)
    assert arguments == {"height": 32, "width": 8, "guidance_scale": 3.0}


def folder_with(index: dict | None) -> str:
    Path("folder").mkdir()
    if index is not None:
        Path("folder/model_index.json").write_text(json.dumps(index))
    return "folder"


UNET = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"]}
BROKEN = {"_class_name": "PixArtAlphaPipeline",
          "transformer": ["diffusers", "PixArtTransformer2DModel"]}


@pytest.mark.parametrize("index, argv, message", [
    (None, (), "'folder' holds no model_index.json that can be read"),
    (UNET, (), "'folder' is a StableDiffusionPipeline without a transformer: "
               "expected --component to be one of unet, vae"),
    ({**BROKEN, "second": [None, None]}, ("--component", "second"),
     "'folder' is a PixArtAlphaPipeline without a second: expected --component to be one of "
     "transformer"),
    (BROKEN, ("--prompts", "none.txt"), "cannot read --prompts 'none.txt'"),
    (BROKEN, ("--prompts", "empty.txt"), "--prompts 'empty.txt' is empty"),
    (BROKEN, ("--num-sampling-steps", "ddim5"), "--num-sampling-steps ddim5 is no number"),
    (BROKEN, ("--pipeline-args", "[1]"), "--pipeline-args '[1]' is no JSON object"),
    (BROKEN, ("--image-size", "256"), "--image-size is for the models of this repository"),
    (BROKEN, ("--cfg-scale", "2"), "--cfg-scale is for the models of this repository"),
    (BROKEN, ("--vae", "mse"), "--vae is for the models of this repository"),
    (BROKEN, ("--calibration-images", "0"), "--calibration-images 0 is too small"),
    (BROKEN, ("--threads", "0"), "--threads 0 is too small"),
    pytest.param(BROKEN, ("--offload",), "--offload keeps what does not run off the GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    (BROKEN, ("--output", "."), "'.' is there already: give another --output"),
    (BROKEN, ("--recipe", "rtn", "--alpha", "0.5"), "--alpha has no effect on this recipe"),
    (BROKEN, ("--output", "made"), "cannot load the pipeline in 'folder'"),
])
def test_a_mistake_is_one_line(index, argv, message, capsys):
    Path("empty.txt").write_text("\n \n")
    folder = folder_with(index)
    line = error_line(capsys, lambda: call(QuantDiT, "--model", folder, *argv))
    assert message in line
    assert not Path("made").exists()


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_part_is_one_line(text, capsys):
    folder = folder_with(BROKEN)
    Path(folder, "transformer").mkdir()
    Path(folder, "transformer/config.json").write_text(text)
    line = error_line(capsys, lambda: call(QuantDiT, "--model", folder, "--output", "made"))
    assert "cannot load the pipeline in 'folder'" in line
    assert not Path("made").exists()


def test_arguments_that_a_pipeline_refuses_are_one_line(float_folder, capsys):
    line = error_line(capsys, lambda: call(
        QuantDiT, "--model", str(float_folder), "--prompts", "prompts.txt", "--output", "made"))
    assert "the PixArtAlphaPipeline cannot sample (Invalid sample size)" in line
    assert not Path("made").exists()


@pytest.mark.parametrize("flag", ["--prompts", "--component"])
def test_flags_of_pipelines_are_refused_where_nothing_reads_them(flag, capsys):
    line = error_line(capsys, lambda: call(QuantDiT, "--model", "DiT-Digits", flag, "vae"))
    assert f"{flag} is for the folder of a diffusers pipeline" in line


def test_threads_are_set_and_flags_without_effect_are_named(capsys, monkeypatch):
    counts = []
    monkeypatch.setattr(pipelines, "load_pipeline", lambda folder: stop(counts))
    with pytest.raises(InterruptedError):
        call(QuantDiT, "--model", folder_with(BROKEN), "--threads", torch.get_num_threads() + 1,
             "--epochs", "3", "--output", "made")
    assert counts == [torch.get_num_threads() + 1]
    assert "warning: --epochs: no effect" in capsys.readouterr().err


def stop(counts: list[int]) -> None:
    """Note how many threads there are, and end the command."""
    counts.append(torch.get_num_threads())
    raise InterruptedError
