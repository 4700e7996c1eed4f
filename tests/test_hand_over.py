"""The way back: what ``ditas.quantize`` made, saved and loaded by diffusers."""
import json
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative
from safetensors.torch import load_file, save_file
from test_ditas import BY_NAME, explored_example, output, random_example, run_on
from torch import nn

import ditas
from ditas.packing import PackedLinear
from ditas.stowed import StowedLinear
from examples.emoji import pixart
from examples.emoji.autoencoder import build_autoencoder

ROOT = Path(__file__).parents[1]
FLUX = "FluxTransformer2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLAGS = {"recipe": "ditas", "group_size": 16, "backend": "fake"}


def quantised_example(name: str, **flags) -> nn.Module:
    model = explored_example(name)
    ditas.quantize(model, run_on(model, BY_NAME[name]), **{**FLAGS, **flags})
    return model


def in_a_fresh_process(code: str, *args: str) -> str:
    """Run code that knows nothing but ``import ditas``; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Factors fold into weights, into new biases, into vectors that enter a block; and one that is
# known by hand.
@pytest.mark.parametrize("name, group_size", [
    (FLUX, 16),
    ("AuraFlowTransformer2DModel", 1024),
    ("Flux2Transformer2DModel", 16),
    ("PixArtTransformer2DModel", 16),
    ("ZImageTransformer2DModel", 1024),
])
def test_a_saved_model_comes_back_the_same(name, group_size, tmp_path):
    import diffusers
    model = quantised_example(name, group_size=group_size)
    expected = output(model, name)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    assert torch.equal(output(loaded, name), expected)
    loaded.save_pretrained(tmp_path / "second")
    again = diffusers.AutoModel.from_pretrained(str(tmp_path / "second"))
    assert type(again) is type(model)
    assert torch.equal(output(again, name), expected)
    first, second = (tmp_path / place / WEIGHTS for place in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_weights_that_are_left_alone_come_back(tmp_path):
    model = random_example(BY_NAME[FLUX])
    exact = output(model, FLUX)
    done = ditas.quantize(model, run_on(model, BY_NAME[FLUX]), "smoothquant", weight_bit=16)
    assert "| W16A8 |" in str(done)
    assert 0 < relative(output(model, FLUX), exact) < 0.03
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.transformer_blocks[0].attn.to_q.in_file["weight"].dtype == torch.float16
    assert torch.equal(output(loaded, FLUX), output(model, FLUX))


def test_codes_are_packed_at_their_width(tmp_path):
    model = quantised_example(FLUX, lowrank=0)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    linear = "transformer_blocks.0.ff.net.0.proj"
    assert tensors[f"{linear}.weight"].dtype == torch.uint8
    assert tensors[f"{linear}.weight"].numel() == 128 * 32 // 2
    configuration = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (configuration["quant_method"], configuration["recipe"]) == ("ditas", "ditas")
    assert configuration["flags"] == {"group_size": 16, "backend": "fake", "lowrank": 0}


def test_bfloat16_leaves_steps_and_factors_in_float32(tmp_path):
    model = quantised_example(FLUX)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    linear, original = (part.transformer_blocks[0].ff.net[2] for part in (loaded, model))
    linear(torch.zeros(1, 3, 128, dtype=torch.bfloat16))
    original(torch.zeros(1, 3, 128))
    linear, original = linear.computing, original.computing
    assert linear.weight.dtype == torch.bfloat16
    for name in ("step", "smooth", "left", "bias"):
        assert torch.equal(getattr(linear, name), getattr(original, name))
    assert loaded.x_embedder.weight.dtype == torch.bfloat16


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [deepcopy, pickled])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_linears_are_expanded_by_their_first_call(is_loaded, copied, tmp_path):
    model = quantised_example(FLUX)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    waiting, other = (other, model) if is_loaded else (model, other)
    held = sum(value.nbytes for value in (*waiting.parameters(), *waiting.buffers()))
    held += sum(value.nbytes for part in waiting.modules() if isinstance(part, PackedLinear)
                for value in part.in_file.values())
    # Nothing is held but what the file holds, its header aside.
    assert held <= (tmp_path / WEIGHTS).stat().st_size
    linear, copy = (part.transformer_blocks[0].ff.net[2] for part in (waiting, copied(waiting)))
    assert not list(linear.computing.buffers())
    x = draw(1, 3, 128)
    with torch.inference_mode():
        expected = linear(x)
    assert type(linear) is PackedLinear
    assert torch.equal(other.transformer_blocks[0].ff.net[2](x), expected)
    assert not any(value.is_inference() for value in linear.computing.buffers())
    # A copy has an arithmetic of its own.
    assert type(copy) is StowedLinear and torch.equal(copy(x), expected)
    # The other linears of a model that is looked at wait.
    assert type(waiting.transformer_blocks[0].attn.to_q) is StowedLinear


def is_mapped(value: torch.Tensor, file: Path) -> bool:
    """Tell whether a tensor lies in the memory that a file is mapped to."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if line.endswith(str(file)) and first <= value.data_ptr() < last:
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped")
def test_codes_stay_in_the_file_until_it_is_written_anew(tmp_path):
    model = quantised_example(FLUX)
    model.save_pretrained(tmp_path)
    stored = (tmp_path / WEIGHTS).read_bytes()
    loaded = type(model).from_pretrained(tmp_path)
    linear = loaded.transformer_blocks[0].ff.net[2]
    # What is multiplied has memory of its own.
    assert is_mapped(linear.in_file["weight"], tmp_path / WEIGHTS)
    assert not any(is_mapped(value, tmp_path / WEIGHTS) for value in linear.in_file.values()
                   if value.is_floating_point())
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == stored
    assert torch.equal(output(loaded, FLUX), output(model, FLUX))


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_compiler_expands_a_model(is_loaded, tmp_path):
    name = "SD3Transformer2DModel"
    model = quantised_example(name, group_size=1024, backend="auto")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    compiled, expected = (loaded, model) if is_loaded else (model, loaded)
    # As the compiler sees it, without the minutes that it takes to compile.
    compiled.compile(backend="eager", fullgraph=True)
    assert relative(output(compiled, name), output(expected, name)) < 0.05
    assert not any(isinstance(part, StowedLinear) for part in compiled.modules())


def test_divided_vectors_stay_in_float32(tmp_path):
    model = quantised_example("Flux2Transformer2DModel")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    blocks = model.transformer_blocks[0], loaded.transformer_blocks[0]
    saved, read = (dict(block.divided_arguments.named_buffers()) for block in blocks)
    assert saved.keys() == read.keys() != set()
    assert all(torch.equal(saved[name], read[name]) for name in saved)


def test_rtn_quantises_while_loading(tmp_path):
    name = "SD3Transformer2DModel"
    model = random_example(BY_NAME[name])
    model.save_pretrained(tmp_path / "float")
    config = ditas.DitasConfig("rtn", weight_bit=8, backend="fake")
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    ditas.quantize(model, recipe="rtn", weight_bit=8, backend="fake")
    assert torch.equal(output(loaded, name), output(model, name))
    loaded.save_pretrained(tmp_path / "quantised")
    again = type(model).from_pretrained(tmp_path / "quantised")
    assert torch.equal(output(again, name), output(model, name))


def test_recipes_that_look_at_data_are_refused_while_loading(tmp_path):
    model = random_example(BY_NAME[FLUX])
    model.save_pretrained(tmp_path)
    with pytest.raises(ditas.UserError, match=r"load the float pipeline, then ditas\.quantize\("):
        type(model).from_pretrained(tmp_path, quantization_config=ditas.DitasConfig("ditas"))


def test_a_flag_is_checked_where_it_is_given():
    with pytest.raises(ditas.UserError, match="'wieght_bit' is no flag of a recipe"):
        ditas.DitasConfig("rtn", wieght_bit=4)


def test_float16_is_refused(tmp_path):
    model = quantised_example(FLUX)
    model.save_pretrained(tmp_path)
    with pytest.raises(ditas.UserError, match=r"torch_dtype=torch\.bfloat16"):
        type(model).from_pretrained(tmp_path, torch_dtype=torch.float16)


def test_a_quantised_model_is_not_cast():
    with pytest.raises(ValueError, match="quantized model"):
        quantised_example(FLUX).to(torch.bfloat16)


def of_another_model(folder: Path) -> None:
    """Give a folder the description of another model's linears."""
    path = folder / "config.json"
    configuration = json.loads(path.read_text())
    stored = configuration["quantization_config"]["stored"]
    stored["layouts"][0]["linears"][0] = "blocks.0.attn1.to_q"
    path.write_text(json.dumps(configuration))


def without_a_tensor(folder: Path) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    del tensors["transformer_blocks.0.attn.to_q.weight"]
    save_file(tensors, path)


def of_another_shape(folder: Path) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    tensors["transformer_blocks.0.attn.to_q.weight"] = torch.zeros(3, dtype=torch.uint8)
    save_file(tensors, path)


@pytest.mark.parametrize("damage, message", [
    (of_another_model, "not that of a FluxTransformer2DModel"),
    (without_a_tensor, "do not fit its quantization_config"),
    (of_another_shape, "do not fit its quantization_config .expected 512 bytes"),
])
def test_a_damaged_folder_is_refused(damage, message, tmp_path):
    model = quantised_example(FLUX)
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ditas.UserError, match=message) as error:
        type(model).from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


LOAD_MODEL = """
import sys
import torch
import ditas
from diffusers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
call = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**call)[0], sys.argv[3])
"""


def test_a_fresh_process_loads_it(tmp_path):
    from architectures.examples import draw_call
    model = quantised_example(FLUX)
    model.save_pretrained(tmp_path)
    call = draw_call(BY_NAME[FLUX])
    torch.save(call, tmp_path / "call.pt")
    paths = [str(tmp_path / name) for name in ("", "call.pt", "output.pt")]
    in_a_fresh_process(LOAD_MODEL, *paths)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "output.pt"), model(**call)[0])


def emoji_pipeline():
    """Make PixArt-Emoji with random weights."""
    torch.manual_seed(0)
    tokenizer = pixart.build_tokenizer(["red", "apple", "lion", "face"])
    parts = pixart.TextToNoise(
        pixart.build_text_encoder(len(tokenizer)), pixart.build_transformer())
    nn.init.normal_(parts.transformer.proj_out.weight, std=0.05)
    pipeline = pixart.make_pipeline(build_autoencoder().eval(), tokenizer, parts.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


LOAD_PIPELINE = """
import sys
import numpy
import ditas
from diffusers import DiffusionPipeline
from examples.emoji.pixart import draw_prompts
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
numpy.save(sys.argv[2], draw_prompts(pipeline, ["red apple", "lion"], steps=2))
"""


def test_a_pipeline_comes_back_and_draws_the_same(tmp_path):
    pipeline = emoji_pipeline()
    prompts = ["red apple", "lion"]
    before = pixart.draw_prompts(pipeline, prompts, steps=2)
    done = ditas.quantize(
        pipeline.transformer, lambda: pixart.draw_prompts(pipeline, prompts, steps=2),
        "ditas", weight_bit=4, act_bit=8, backend="fake")
    images = pixart.draw_prompts(pipeline, prompts, steps=2)
    assert len(done.sites) == 7 * 7 + 1
    # They are near, and not the same.
    assert 0 < relative(torch.tensor(images), before) < 0.2
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline/model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    (tmp_path / "pipeline/model_index.json").write_text(json.dumps(index))
    in_a_fresh_process(LOAD_PIPELINE, str(tmp_path / "pipeline"), str(tmp_path / "images.npy"))
    assert np.array_equal(np.load(tmp_path / "images.npy"), images)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


ENCODERS = ("vae", "text_encoder", "tokenizer")
# Pipelines whose text was encoded before: what they lack, and what they are called with.
PIPELINES = {
    "FluxPipeline": (
        FLUX, (*ENCODERS, "text_encoder_2", "tokenizer_2"),
        {"prompt_embeds": draw(1, 5, 24), "pooled_prompt_embeds": draw(1, 20)}),
    # Guided, in calls of twice as many images.
    "StableDiffusion3Pipeline": (
        "SD3Transformer2DModel",
        (*ENCODERS, "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        {"prompt_embeds": draw(1, 5, 24), "negative_prompt_embeds": draw(1, 5, 24) / 2,
         "pooled_prompt_embeds": draw(1, 20), "negative_pooled_prompt_embeds": draw(1, 20) / 2}),
    # Guided, in two calls a step of a single video.
    "WanPipeline": (
        "WanTransformer3DModel", ENCODERS,
        {"prompt_embeds": draw(1, 5, 24), "negative_prompt_embeds": draw(1, 5, 24) / 2,
         "num_frames": 5}),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_other_pipelines_are_quantised_through_their_own_sampling(kind, tmp_path):
    import diffusers
    name, lacking, arguments = PIPELINES[kind]
    absent = dict.fromkeys(lacking)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = random_example(BY_NAME[name])
    pipeline = getattr(diffusers, kind)(scheduler=scheduler, transformer=model, **absent)
    pipeline.set_progress_bar_config(disable=True)

    def sample(sampled) -> torch.Tensor:
        return sampled(
            height=64, width=64, num_inference_steps=3, output_type="latent",
            generator=torch.Generator().manual_seed(0), **arguments)[0]

    before = sample(pipeline)
    done = ditas.quantize(
        model, lambda: sample(pipeline), "smoothquant", weight_bit=8, backend="fake")
    assert any(row.factors.startswith("at run time") for row in done.sites)
    after = sample(pipeline)
    assert 0 < relative(after, before) < 0.05
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded), after)


def test_without_the_import_diffusers_does_not_know_it(tmp_path):
    quantised_example(FLUX).save_pretrained(tmp_path)
    code = LOAD_MODEL.replace("import ditas\n", "")
    with pytest.raises(AssertionError, match="Unknown quantization type, got ditas"):
        in_a_fresh_process(code, str(tmp_path))
