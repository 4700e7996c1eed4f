import json
import os
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from conftest import block_linears, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import config
from config import RECIPES
from diffusion import ImageNoise, ddpm_step, make_schedule
from diffusion.generate import generate_latents, guided_drive
from errors import UserError
from evaluation.judge import sqnr_judge
from models import DiT_models
from quant import checkpoint
from quant.checkpoint.tensors import pack
from quant.install import install
from quant.layers.fold import fold
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from quant.refinement.allocation import GroupSearch

MODEL = "DiT-Digits"
CONFIGURATION = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 128, "depth": 10,
    "num_heads": 4, "num_classes": 10}


def digits_model():
    model = random_model(hidden_size=128, depth=10)
    assert model.state_dict().keys() == DiT_models[MODEL].build(16).state_dict().keys()
    return model


def stored(model):
    """Unquantised tensors as the file keeps them."""
    return model.half().float()


def header(recipe_name, weight_bit, act_bit=8, **kwargs):
    return checkpoint.Header(**{**dict(model=MODEL, image_size=16, num_classes=10, weight_bit=weight_bit, act_bit=act_bit, recipe_name=recipe_name,
                                       recipe=RECIPES[recipe_name], seed=3, num_sampling_steps="2", svd="fast", alphas={"blocks.0.attn.qkv": 0.5}), **kwargs})


def quantised(recipe_name, weight_bit):
    noise = ImageNoise(0, range(2), (4, 8, 8))
    recipe = replace(RECIPES[recipe_name], rounds=2, iterations=2, population=3, generations=1)  # for speed; what matters here is what is written
    schedule, model = make_schedule("2"), digits_model()
    return quantize_model(
        model, recipe, BitWidths(weight_bit, 8),
        guided_drive(schedule, noise(), noise, torch.arange(2), 1.5),
        search=GroupSearch(sqnr_judge(model, schedule, 0)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    with torch.no_grad():
        checkpoint.save(path, digits_model(), quantised("ditas", 4), header("ditas", 4))
    return path


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("backend", ["fake", "integer"])
def test_a_loaded_model_does_not_keep_the_file_in_memory(saved, backend):
    header, model = checkpoint.load(saved, "cpu", True, backend)
    with open("/proc/self/maps") as mapped:
        assert str(saved) not in mapped.read()


@pytest.mark.parametrize("recipe_name, weight_bit", [("rtn", 2), ("rtn", 3), ("smoothquant", 8), ("ditas", 4), ("ditas", 5), ("ditas-published", 4), ("ptq4dm", 4),
                                                     ("repq-vit", 4), ("tfmq-dm", 3), ("g4w-p4a", 4), ("ptq4dit", 4), ("qdit", 4), ("ditas-plus", 4)])
def test_a_reloaded_model_computes_the_same_bits(tmp_path, recipe_name, weight_bit):
    result = quantised(recipe_name, weight_bit)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, digits_model(), result, header(recipe_name, weight_bit, groups=result.groups))
    back, model = checkpoint.load(path)
    expected = header(recipe_name, weight_bit, groups=result.groups)
    assert replace(back, architecture="", configuration={}) == expected
    assert (back.architecture, back.configuration) == ("dit", CONFIGURATION)
    expected = install(stored(digits_model()), result.layers, operands=result.operands)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 800]), torch.tensor([0, 10])
    assert torch.equal(model(x, t, y), expected(x, t, y))
    kept = stored(digits_model())
    expected = install(kept, fold(kept, result.layers), operands={name: each.fold() for name, each in result.operands.items()})
    images = [generate_latents(each, make_schedule("2"), range(2), torch.tensor([1, 7]), 0, 1.5, ddpm_step)
              for each in (checkpoint.load(path, folded=True)[1], expected)]
    assert torch.equal(*images) and torch.isfinite(images[0]).all()
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_codes_take_their_true_width(saved):
    tensors = load_file(saved)
    for name, linear in block_linears(digits_model()).items():
        assert tensors[f"{name}.codes"].numel() == linear.weight.numel() // 2 and tensors[f"{name}.codes"].dtype == torch.uint8
        assert f"{name}.weight" not in tensors
    with safe_open(saved, framework="pt") as file:
        fields = json.loads(file.metadata()["ditas"])
    assert fields["model"] == MODEL and fields["recipe"]["weight_group"] == 64 and fields["format_version"] == 5


def test_the_path_may_lack_its_extension(saved):
    assert checkpoint.find(str(saved)) == saved == checkpoint.find(str(saved.with_suffix("")))
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.find(str(saved) + "x")


def damaged(saved, tmp_path, change_tensors=None, change_header=None, metadata=True):
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as file:
        fields = json.loads(file.metadata()["ditas"])
    if change_tensors:
        change_tensors(tensors)
    if change_header:
        change_header(fields)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata={"ditas": json.dumps(fields)} if metadata else None)
    return path


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
    (lambda f: f.update(image_size=None) or f["configuration"].update(depth=9), "unexpected 'blocks.9"),
    (lambda f: f.update(image_size=None) or f["configuration"].update(depth="9"), "positive numbers"),
    (lambda f: f.update(image_size=None) or f["configuration"].pop("depth"), "expected the fields"),
    (lambda f: f["recipe"].update(weight_granularity="nonsense"), "unknown quantiser"),
    (lambda f: f["recipe"].update(weight_group=32), "bytes for"),
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


def test_other_files_are_refused_and_pickles_do_not_run(saved, tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    evil = tmp_path / "evil.safetensors"
    evil.write_bytes(pickle.dumps(Evil()))
    half = tmp_path / "half.safetensors"
    half.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    for path in (evil, half, empty):
        with pytest.raises(UserError, match="truncated, or not a safetensors file"):
            checkpoint.load(path)
    assert not ran.exists()
    with pytest.raises(UserError, match="not a quantised checkpoint"):
        checkpoint.load(damaged(saved, tmp_path, metadata=False))


def test_a_failed_write_leaves_nothing(saved, tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(checkpoint.store, "save_file", full_disk)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path / "model.safetensors", digits_model(), Result({}), header("rtn", 4))
    assert os.listdir(tmp_path) == []


def test_default_names_say_what_was_done():
    assert checkpoint.default_name("DiT-XL/2", 256, config.weight_bit, config.act_bit, "ditas") == "DiT-XL-2-256-W4A8-ditas.safetensors"


def test_an_older_format_is_still_read(saved, tmp_path):
    """Format 1: zero points in a byte each, float32 scales and factors, no integer steps, adaLN in float32."""
    name = "blocks.2.mlp.fc1"
    recipe = replace(RECIPES["ditas"], weight_scales="float", adaln_bits=16)
    noise = ImageNoise(0, range(2), (4, 8, 8))
    layers = quantize_model(
        digits_model(), recipe, BitWidths(4, 8),
        guided_drive(make_schedule("2"), noise(), noise, torch.arange(2), 1.5)).layers
    tensors = {key: value for key, value in digits_model().state_dict().items() if key.removesuffix(".weight") not in layers}
    for key, layer in layers.items():
        weight = layer.weight.base
        tensors |= {f"{key}.codes": pack(weight.codes, 4), f"{key}.scale": weight.scale, f"{key}.zero": weight.zero.to(torch.uint8),
                    f"{key}.left": layer.weight.left, f"{key}.right": layer.weight.right / 3, f"{key}.smooth": layer.smoothing.factors}
    fields = asdict(header("ditas", 4, recipe=recipe, format_version=1))
    known = ("balance", "timestep", "alphas", "weight_granularity", "weight_group", "act_granularity", "convention", "rank", "rounds", "keep", "order")
    fields["recipe"] = {key: fields["recipe"][key] for key in known}
    del fields["groups"]
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"ditas": json.dumps(fields)})
    old = checkpoint.read(tmp_path / "old.safetensors")
    back, read = old.header, old.layers
    assert back.recipe == recipe and read.keys() == layers.keys()
    expected = layers[name].weight
    assert torch.allclose(read[name].weight.dense(), expected.base.dequantize() + expected.left @ expected.right / 3)
    assert checkpoint.backend_for(back, "auto", torch.device("cpu"), pytest.fail) == "fake"
    with pytest.raises(UserError, match="quantise again with --weight-scales two-level"):
        checkpoint.backend_for(back, "integer", torch.device("cpu"), pytest.fail)


def test_powers_of_root_two_of_format_3_begin_at_1(tmp_path):
    model, noise, schedule = digits_model(), ImageNoise(0, range(2), (4, 8, 8)), make_schedule("1")
    result = quantize_model(
        model, RECIPES["repq-vit"], BitWidths(4, 8),
        guided_drive(schedule, noise(), noise, torch.arange(2), 1.5))
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, model, result, header("repq-vit", 4, recipe=RECIPES["repq-vit"]))
    tensors = {key: value[:3].clone() if key.endswith(".operands") else value for key, value in load_file(path).items()}
    fields = asdict(header("repq-vit", 4, recipe=RECIPES["repq-vit"], format_version=3))
    save_file(tensors, path, metadata={"ditas": json.dumps(fields)})
    scales = [each.probabilities.scale for each in checkpoint.read(path).operands.values()]
    assert scales == [1.0] * 10 and all(each.probabilities.scale < 1 for each in result.operands.values())


@pytest.mark.parametrize("adaln_bits, share", [(16, 2.0), (8, 1.0), (4, 0.5)])
def test_modulation_takes_its_share_of_the_file(tmp_path, adaln_bits, share):
    recipe = replace(RECIPES["rtn"], adaln_bits=adaln_bits)
    result = quantize_model(digits_model(), recipe, BitWidths(4, 8), None)
    checkpoint.save(tmp_path / "model.safetensors", digits_model(), result, header("rtn", 4, recipe=recipe))
    sizes = [value.numel() * value.element_size() for key, value in load_file(tmp_path / "model.safetensors").items()
             if key.startswith("blocks.1.adaLN_modulation.1.") and key.endswith(("codes", "weight"))]
    assert sizes == [share * 6 * 128 * 128]
    assert checkpoint.load(tmp_path / "model.safetensors")[0].recipe.adaln_bits == adaln_bits


@pytest.mark.parametrize("recipe_name, act_bit", [("ptq4dit", 16), ("repq-vit", 8), ("tfmq-dm", 16), ("qdit", 16), ("ptq4dit", 8)])
def test_recipes_reload_without_activation_bits_and_in_bfloat16(tmp_path, recipe_name, act_bit):
    recipe = replace(RECIPES[recipe_name], iterations=1, population=2, generations=1)
    model, noise, schedule = digits_model(), ImageNoise(0, range(2), (4, 8, 8)), make_schedule("1")
    result = quantize_model(
        model, recipe, BitWidths(4, act_bit),
        guided_drive(schedule, noise(), noise, torch.arange(2), 1.5),
        search=GroupSearch(sqnr_judge(model, schedule, 0)))
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, model, result, header(recipe_name, 4, act_bit, recipe=recipe, groups=result.groups))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 800]), torch.tensor([0, 10])
    exact = checkpoint.load(path)[1](*inputs)
    for folded in (False, True):
        assert checkpoint.load(path, folded=folded, dtype=torch.bfloat16)[1](*inputs).dtype == torch.float32
        assert torch.isfinite(checkpoint.load(path, folded=folded)[1](*inputs)).all()
    assert torch.equal(exact, install(stored(digits_model()), result.layers, operands=result.operands)(*inputs))
