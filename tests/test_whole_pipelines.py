"""Pipelines from the command line: a quantised folder, and the same outputs from it."""
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, error_line
from test_hand_over import in_a_fresh_process
from test_pipelines import WORDS
from tiny_pipelines import PIPELINES, name_the_tokenizers, save, two_wans

import QuantDiT
import sample_merge_TAS
from cli import pipelines
from diffusion.noise import image_generators
from ditas.switching import switch_backend
from errors import UserError
from evaluation.metrics import sqnr_db
from examples.emoji import pixart
from files.npz import read_arrays
from sampling.pipeline import as_bytes

STEPS = 2
RECIPES = {
    "rtn": (),
    "ditas": ("--group-size", "16", "--lowrank", "4"),
    # Ranges of every timestep, of linears and of attention's operands.
    "ptq4dm": ("--act-steps", "each", "--attention", "uniform"),
}
SEED = 5

# It knows nothing of this repository but ``ditas``.
DRAW = """
import json, sys
import numpy, torch
import ditas
from ditas.switching import is_quantised, switch_backend
from diffusers import DiffusionPipeline
torch.set_num_threads(int(sys.argv[1]))
words = json.loads(sys.argv[2])
for folder in sys.argv[3:]:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module) and is_quantised(part):
            switch_backend(part, "fake")
    generators = [torch.Generator().manual_seed(i) for i in range(len(words))]
    arguments = json.load(open(folder + "/call.json"))
    output = pipeline(words, generator=generators, output_type="np", **arguments)[0]
    numpy.save(folder + ".npy", output)
"""


def draw_in_a_fresh_process(words: list[str], *folders: Path) -> None:
    """Draw as each folder's call.json says, into a file beside it."""
    in_a_fresh_process(DRAW, str(torch.get_num_threads()), json.dumps(words), *map(str, folders))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Quantise every pipeline with every recipe; returns their folders and what each drew.

    The last are the images that sampling shall give.
    """
    return {name: quantised_pipeline(name, tmp_path_factory.mktemp(name)) for name in PIPELINES}


@pytest.fixture(scope="module")
def redrawn(quantised) -> None:
    """Let one process draw from all folders."""
    folders = [place / recipe for place, _ in quantised.values() for recipe in RECIPES]
    draw_in_a_fresh_process(WORDS, *folders)


def quantised_pipeline(name: str, place: Path) -> tuple[Path, dict[str, np.ndarray]]:
    save(name, place / "float")
    (place / "prompts.txt").write_text("\n".join(WORDS))
    drawn = {}
    for recipe, flags in RECIPES.items():
        loaded = []
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(pipelines, "load_pipeline", partial(kept, loaded))
            call(QuantDiT, "--model", place / "float", "--recipe", recipe, *flags,
                 "--prompts", place / "prompts.txt", "--num-sampling-steps", STEPS,
                 "--output", place / recipe, "--pipeline-args", json.dumps(PIPELINES[name][1]))
        name_the_tokenizers(place / recipe)
        drawn[recipe] = draw(loaded[0], name, plain_generators())
        drawn[f"{recipe} {SEED}"] = draw(loaded[0], name, image_generators(SEED, range(3)))
    return place, drawn


def kept(loaded: list, folder: Path):
    """Load a pipeline and keep it: it is quantised where it is."""
    loaded.append(pipelines.read_pipeline(folder))
    return loaded[0]


def plain_generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(len(WORDS))]


def draw(pipeline, name: str, generators: list[torch.Generator]) -> np.ndarray:
    switch_backend(pipeline.transformer, "fake")
    with torch.no_grad():
        return pipeline(WORDS, generator=generators, output_type="np", num_inference_steps=STEPS,
                        **PIPELINES[name][1])[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_fresh_process_draws_what_was_quantised(quantised, redrawn, name):
    place, drawn = quantised[name]
    arguments = {"num_inference_steps": STEPS, **PIPELINES[name][1]}
    for recipe in RECIPES:
        again = np.load(place / f"{recipe}.npy")
        assert np.isfinite(again).all() and np.array_equal(again, drawn[recipe])
    assert not np.array_equal(drawn["rtn"], drawn["ditas"])
    assert json.loads((place / "ditas/call.json").read_text()) == arguments


@pytest.mark.parametrize("name", PIPELINES)
def test_sampling_draws_images_and_refuses_videos(quantised, name, tmp_path, monkeypatch, capsys):
    place, drawn = quantised[name]
    monkeypatch.chdir(tmp_path)
    words = ("--path", place / "ptq4dm", "--prompts", place / "prompts.txt", "--backend", "fake",
             "--global-seed", SEED, "--threads", torch.get_num_threads(), "--num-fid-samples", 3,
             "--per-proc-batch-size", 3)
    if name == "Wan":
        line = error_line(capsys, lambda: call(sample_merge_TAS, *words))
        assert "a WanPipeline makes videos, and PNGs hold images" in line
        assert not Path("samples").exists()
        return
    call(sample_merge_TAS, *words)
    images = read_arrays(next(Path("samples").glob("*.npz")))["arr_0"]
    assert images.shape == (3, 16, 16, 3)
    assert np.array_equal(images, as_bytes(drawn[f"ptq4dm {SEED}"], 3))


def test_a_second_transformer_is_quantised_on_top_of_the_first(tmp_path, capsys):
    two_wans().save_pretrained(tmp_path / "float")
    name_the_tokenizers(tmp_path / "float")
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS))
    words = ("--prompts", tmp_path / "prompts.txt", "--num-sampling-steps", STEPS)
    call(QuantDiT, "--model", tmp_path / "float", "--recipe", "smoothquant", *words,
         "--output", tmp_path / "first", "--pipeline-args", json.dumps(PIPELINES["Wan"][1]))
    name_the_tokenizers(tmp_path / "first")
    loaded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "load_pipeline", partial(kept, loaded))
        # It is called as the first one was.
        call(QuantDiT, "--model", tmp_path / "first", "--component", "transformer_2",
             "--recipe", "ptq4dm", *RECIPES["ptq4dm"], *words, "--output", tmp_path / "both")
    name_the_tokenizers(tmp_path / "both")
    switch_backend(loaded[0].transformer_2, "fake")
    drawn = draw(loaded[0], "Wan", plain_generators())
    draw_in_a_fresh_process(WORDS, tmp_path / "both")
    assert np.array_equal(np.load(f"{tmp_path / 'both'}.npy"), drawn)
    # The first one is as it was, and the second one is not.
    first, both = (tmp_path / name for name in ("first", "both"))
    file = "diffusion_pytorch_model.safetensors"
    for component, is_same in (("transformer", True), ("transformer_2", False)):
        before, after = ((place / component / file).read_bytes() for place in (first, both))
        assert (before == after) == is_same
    recipes = [json.loads((both / name / "config.json").read_text())["quantization_config"][
        "recipe"] for name in ("transformer", "transformer_2")]
    assert recipes == ["smoothquant", "ptq4dm"]
    line = error_line(capsys, lambda: call(
        QuantDiT, "--model", first, *words, "--output", tmp_path / "again"))
    assert "the transformer of " in line and "is quantised already" in line
    assert not (tmp_path / "again").exists()


def test_images_that_are_none_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        as_bytes(np.full((1, 4, 4, 3), np.nan), 1)
    with pytest.raises(UserError, match="2 images for 1 prompts"):
        as_bytes(np.zeros((2, 4, 4, 3)), 1)
    with pytest.raises(UserError, match=r"arrays of shape \(1, 5, 4, 4, 3\)"):
        as_bytes(np.zeros((1, 5, 4, 4, 3)), 1)


EMOJI = ["red apple", "lion face", "blue heart"]


def quantised_emoji(recipe: str, steps: int, output: Path):
    """Quantise PixArt-Emoji with its real weights; returns the pipeline in which that was done."""
    prompts, loaded = output.parent / "emoji.txt", []
    prompts.write_text("\n".join(EMOJI))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(pipelines, "load_pipeline", partial(kept, loaded))
        call(QuantDiT, "--model", pixart.FOLDER, "--recipe", recipe, "--prompts", prompts,
             "--num-sampling-steps", steps, "--output", output)
    switch_backend(loaded[0].transformer, "fake")
    return loaded[0]


def drawn_emoji(pipeline, folder: Path, output_type: str):
    """Draw as the folder says; returns images or latents."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(EMOJI))]
    arguments = json.loads((folder / "call.json").read_text())
    with torch.no_grad():
        return pipeline(EMOJI, generator=generators, output_type=output_type, **arguments)[0]


def test_pixart_emoji_itself_comes_back(tmp_path):
    folder = tmp_path / "emoji"
    images = drawn_emoji(quantised_emoji("rtn", 2, folder), folder, "np")
    name_the_tokenizers(folder)
    draw_in_a_fresh_process(EMOJI, folder)
    assert np.array_equal(np.load(f"{folder}.npy"), images)


@pytest.mark.slow
def test_pixart_emoji_gains_by_each_recipe(tmp_path):
    latents = {recipe: drawn_emoji(quantised_emoji(recipe, 10, tmp_path / recipe),
                                   tmp_path / recipe, "latent")
               for recipe in ("rtn", "ditas", "ditas-plus")}
    exact = drawn_emoji(pipelines.read_pipeline(pixart.FOLDER), tmp_path / "rtn", "latent")
    kept_db = [sqnr_db(exact, values) for values in latents.values()]
    assert kept_db == sorted(kept_db) and kept_db[2] > kept_db[0] + 3
