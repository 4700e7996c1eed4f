"""Quantised checkpoints: they compute the same bits, and what does not fit is refused."""
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    LATENT_SHAPE,
    block_linears,
    checkpoint_header,
    noise_drive,
    random_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import config
from cards import DiT_models
from config import RECIPES
from diffusion import ddpm_step, make_schedule
from diffusion.generate import Sampling, generate_latents
from errors import UserError
from evaluation.judge import sqnr_judge
from models import DiT, build_model
from quant import checkpoint
from quant.install import install
from quant.layers.fold import fold
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from quant.refinement.allocation import GroupSearch

MODEL = "DiT-Digits"
CONFIGURATION = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 128,
    "depth": 10,
    "num_heads": 4,
    "num_classes": 10,
}
MAPPED_FILES = Path("/proc/self/maps")


def digits_model() -> DiT:
    """Make a random model of the bundled one's shape."""
    model = random_model(hidden_size=128, depth=10)
    assert model.state_dict().keys() == build_model(DiT_models[MODEL], 16).state_dict().keys()
    return model


def stored(model: nn.Module) -> nn.Module:
    """Round unquantised tensors as the file does."""
    return model.half().float()


def header(recipe_name: str, weight_bit: int, act_bit: int = 8, **fields) -> checkpoint.Header:
    """Make the header of a checkpoint that tests write; ``fields`` override."""
    fields = {"seed": 3, "alphas": {"blocks.0.attn.qkv": 0.5}, **fields}
    return checkpoint_header(recipe_name, weight_bit=weight_bit, act_bit=act_bit, **fields)


def quantised(recipe_name: str, weight_bit: int) -> Result:
    """Quantise as fast as the recipe can go: what matters here is what is written."""
    recipe = RECIPES[recipe_name]
    recipe = replace(recipe, rounds=2, iterations=2, population=3, generations=1)
    model = digits_model()
    return quantize_model(
        model, recipe, BitWidths(weight_bit, 8), noise_drive(2, torch.arange(2)),
        search=GroupSearch(sqnr_judge(model, Sampling(make_schedule("2"), 0, 1.0, "ddim"))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    with torch.no_grad():
        checkpoint.save(path, digits_model(), quantised("ditas", 4), header("ditas", 4))
    return path


@pytest.mark.skipif(not MAPPED_FILES.exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("backend", ["fake", "integer"])
def test_a_loaded_model_does_not_keep_the_file_in_memory(saved, backend):
    loaded = checkpoint.load(saved, "cpu", True, backend)
    assert str(saved) not in MAPPED_FILES.read_text()
    del loaded


def two_images(model: nn.Module) -> Tensor:
    """Sample two latents, one class each."""
    labels = torch.tensor([1, 7])
    return generate_latents(model, make_schedule("2"), range(2), labels, 0, 1.5, ddpm_step)


@pytest.mark.parametrize("recipe_name, weight_bit", [
    ("rtn", 2),
    ("rtn", 3),
    ("smoothquant", 8),
    ("ditas", 4),
    ("ditas", 5),
    ("ditas-published", 4),
    ("ptq4dm", 4),
    ("repq-vit", 4),
    ("tfmq-dm", 3),
    ("g4w-p4a", 4),
    ("ptq4dit", 4),
    ("qdit", 4),
    ("ditas-plus", 4),
])
def test_a_reloaded_model_computes_the_same_bits(tmp_path, recipe_name, weight_bit):
    result = quantised(recipe_name, weight_bit)
    written = header(recipe_name, weight_bit, groups=result.groups)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, digits_model(), result, written)
    read, model = checkpoint.load(path)
    assert replace(read, architecture="", configuration={}) == written
    assert read.architecture == "dit"
    assert read.configuration == CONFIGURATION

    expected = install(stored(digits_model()), result.layers, operands=result.operands)
    inputs = torch.randn(2, *LATENT_SHAPE), torch.tensor([10, 800]), torch.tensor([0, 10])
    assert torch.equal(model(*inputs), expected(*inputs))

    folded = stored(digits_model())
    layers = fold(folded, result.layers)
    operands = {name: quantisers.fold() for name, quantisers in result.operands.items()}
    expected = two_images(install(folded, layers, operands=operands))
    assert torch.equal(two_images(checkpoint.load(path, folded=True)[1]), expected)
    assert torch.isfinite(expected).all()
    assert os.listdir(tmp_path) == ["model.safetensors"]


def stored_fields(path: Path) -> dict:
    """Read the header as it is written in the file."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["ditas"])


def test_codes_take_their_true_width(saved):
    tensors = load_file(saved)
    for name, linear in block_linears(digits_model()).items():
        codes = tensors[f"{name}.codes"]
        assert codes.numel() == linear.weight.numel() // 2
        assert codes.dtype == torch.uint8
        assert f"{name}.weight" not in tensors


def test_the_header_says_what_was_done(saved):
    fields = stored_fields(saved)
    assert fields["model"] == MODEL
    assert fields["recipe"]["weight_group"] == 64
    assert fields["format_version"] == 6


def test_the_path_may_lack_its_extension(saved):
    assert checkpoint.find(str(saved)) == saved
    assert checkpoint.find(str(saved.with_suffix(""))) == saved
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.find(str(saved) + "x")


def unchanged(contents: dict) -> None:
    """Leave tensors or header as they are."""


def damaged(
    saved: Path,
    folder: Path,
    change_tensors: Callable[[dict], object] = unchanged,
    change_header: Callable[[dict], object] = unchanged,
) -> Path:
    """Write a copy of a checkpoint with other tensors or another header."""
    tensors, fields = load_file(saved), stored_fields(saved)
    change_tensors(tensors)
    change_header(fields)
    path = folder / "damaged.safetensors"
    save_file(tensors, path, metadata={"ditas": json.dumps(fields)})
    return path


def configured(fields: dict) -> dict:
    """Let a header describe a model that has no name here, and return its configuration."""
    fields.update(image_size=None)
    return fields["configuration"]


@pytest.mark.parametrize("change, message", [
    (lambda f: f.update(format_version=99), "format version 99, expected 1 or 2"),
    (lambda f: f.pop("format_version"), "damaged header"),
    (lambda f: f.update(model="DiT-Nope"), "unknown here"),
    (lambda f: f.update(weight_bit=9), "unknown here"),
    (lambda f: f.update(weight_bit=5), "bytes for"),
    (lambda f: f.update(image_size=256), "image size 256"),
    (lambda f: f.update(num_classes=1000), "configuration is not that"),
    (lambda f: f.update(model="DiT-S/8", image_size=256), "configuration is not that"),
    (lambda f: f["configuration"].update(depth=9), "configuration is not that"),
    (lambda f: f.update(architecture="nope"), "configuration is not that"),
    (lambda f: f.update(architecture="nope", image_size=None), "'nope' is unknown here"),
    (lambda f: configured(f).update(depth=9), "unexpected 'blocks.9"),
    (lambda f: configured(f).update(depth="9"), "positive numbers"),
    (lambda f: configured(f).pop("depth"), "expected the fields"),
    (lambda f: f["recipe"].update(weight_granularity="nonsense"), "unknown quantiser"),
    (lambda f: f["recipe"].update(weight_group=32), "qkv.scale is \\(384, 2, 1\\), expected"),
    (lambda f: f["recipe"].update(surplus=1), "damaged header"),
    (lambda f: f.update(recipe=[1]), "damaged header"),
])
def test_headers_that_lie_are_refused(saved, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load(damaged(saved, tmp_path, change_header=change))
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("blocks.3.mlp.fc1.codes"), "blocks.3.mlp.fc1.codes"),
    (lambda t: t.pop("final_layer.linear.weight"), "final_layer.linear.weight"),
    (lambda t: t.update(extra=torch.zeros(1)), "unexpected 'extra'"),
    (lambda t: t.update({"blocks.0.attn.qkv.smooth": torch.ones(7)}), "expected \\(128,\\)"),
    (lambda t: t.update({"blocks.0.attn.qkv.left": torch.ones(7, 7)}), "left"),
])
def test_tensors_that_do_not_fit_are_refused(saved, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        checkpoint.load(damaged(saved, tmp_path, change_tensors=change))


def test_pickles_do_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    evil = tmp_path / "evil.safetensors"
    evil.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="truncated, or not a safetensors file"):
        checkpoint.load(evil)
    assert not ran.exists()


@pytest.mark.parametrize("share", [0.5, 0])
def test_truncated_files_are_refused(saved, tmp_path, share):
    kept = int(share * saved.stat().st_size)
    path = tmp_path / "truncated.safetensors"
    path.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(UserError, match="truncated, or not a safetensors file"):
        checkpoint.load(path)


def test_a_file_of_bare_tensors_is_refused(saved, tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file(load_file(saved), path)
    with pytest.raises(UserError, match="not a quantised checkpoint"):
        checkpoint.load(path)


def test_a_failed_write_leaves_nothing(saved, tmp_path, monkeypatch):
    def fill_the_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.store, "save_file", fill_the_disk)
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError):
        checkpoint.save(path, digits_model(), Result({}), header("rtn", 4))
    assert os.listdir(tmp_path) == []


def test_default_names_say_what_was_done():
    name = checkpoint.default_name("DiT-XL/2", 256, config.weight_bit, config.act_bit, "ditas")
    assert name == "DiT-XL-2-256-W4A8-ditas.safetensors"


@pytest.mark.parametrize("adaln_bits, share", [
    (16, 2.0),
    (8, 1.0),
    (4, 0.5),
])
def test_modulation_takes_its_share_of_the_file(tmp_path, adaln_bits, share):
    recipe = replace(RECIPES["rtn"], adaln_bits=adaln_bits)
    result = quantize_model(digits_model(), recipe, BitWidths(4, 8), None)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, digits_model(), result, header("rtn", 4, recipe=recipe))
    sizes = []
    for key, value in load_file(path).items():
        if key.startswith("blocks.1.adaLN_modulation.1.") and key.endswith(("codes", "weight")):
            sizes.append(value.numel() * value.element_size())
    assert sizes == [share * 6 * 128 * 128]
    assert checkpoint.load(path)[0].recipe.adaln_bits == adaln_bits


@pytest.mark.parametrize("recipe_name, act_bit", [
    ("ptq4dit", 16),
    ("repq-vit", 8),
    ("tfmq-dm", 16),
    ("qdit", 16),
    ("ptq4dit", 8),
])
def test_recipes_reload_without_activation_bits_and_in_bfloat16(tmp_path, recipe_name, act_bit):
    recipe = replace(RECIPES[recipe_name], iterations=1, population=2, generations=1)
    model = digits_model()
    result = quantize_model(
        model, recipe, BitWidths(4, act_bit), noise_drive(1, torch.arange(2)),
        search=GroupSearch(sqnr_judge(model, Sampling(make_schedule("1"), 0, 1.5))))
    path = tmp_path / "model.safetensors"
    written = header(recipe_name, 4, act_bit, recipe=recipe, groups=result.groups)
    checkpoint.save(path, model, result, written)

    inputs = torch.randn(2, *LATENT_SHAPE), torch.tensor([10, 800]), torch.tensor([0, 10])
    output = checkpoint.load(path)[1](*inputs)
    expected = install(stored(digits_model()), result.layers, operands=result.operands)
    assert torch.equal(output, expected(*inputs))
    for folded in (False, True):
        _, half = checkpoint.load(path, folded=folded, dtype=torch.bfloat16)
        assert half(*inputs).dtype == torch.float32
        _, full = checkpoint.load(path, folded=folded)
        assert torch.isfinite(full(*inputs)).all()
