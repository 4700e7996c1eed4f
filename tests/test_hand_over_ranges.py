"""Ranges per timestep and quantised operands of attention in folders of diffusers."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_ditas import BY_NAME, FLUX, explored_example, output, random_example
from test_hand_over import LOAD_MODEL, WEIGHTS, in_a_fresh_process
from torch import Tensor, nn

import ditas
from architectures.examples import draw_call
from architectures.registry import architecture_of, describe
from architectures.sites import Call
from quant.checkpoint.tensors import read_operands

PIXART = "PixArtTransformer2DModel"
RATIOS = (1.0, 0.6, 0.1)
SHORT = {"iterations": 2}
STATIC = {"act_range": "static", "act_granularity": "tensor", "attention": "uniform"}


def call_at(name: str, ratio: float) -> Call:
    """Draw a call at a share of the example's timestep, with less noise where that is small."""
    call = draw_call(BY_NAME[name])
    time = call["timestep"]
    timestep = (time.amax() * ratio).to(time.dtype).expand(len(time))
    return {**call, "timestep": timestep, "hidden_states": call["hidden_states"] * ratio}


@torch.no_grad()
def outputs(model: nn.Module, name: str) -> Tensor:
    return torch.cat([model(**call_at(name, ratio))[0] for ratio in RATIOS])


def quantised(name: str, recipe: str, model: nn.Module | None = None, **flags) -> nn.Module:
    if model is None:
        model = random_example(BY_NAME[name]) if name == PIXART else explored_example(name)
    ditas.quantize(model, lambda: outputs(model, name), recipe, **flags)
    return model


@pytest.mark.parametrize("name, recipe, flags", [
    (PIXART, "tfmq-dm", SHORT),
    (PIXART, "ptq4dm", {}),
    (PIXART, "repq-vit", {}),
    (PIXART, "ptq4dit", SHORT),
    (PIXART, "g4w-p4a", {}),
    # Nothing is known of its class where it is loaded.
    (FLUX, "ptq4dm", {"act_steps": "each", "attention": "uniform"}),
    (FLUX, "repq-vit", {"act_steps": "embedding"}),
    (FLUX, "ptq4dit", SHORT),
])
def test_what_was_saved_computes_the_same(name, recipe, flags, tmp_path):
    model = quantised(name, recipe, **flags)
    expected = outputs(model, name)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    assert torch.equal(outputs(loaded, name), expected)
    loaded.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / place / WEIGHTS for place in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_each_call_finds_its_timestep(tmp_path):
    model = quantised(FLUX, "ptq4dm", act_steps="each")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for number, ratio in enumerate(RATIOS):
        with torch.no_grad():
            loaded(**call_at(FLUX, ratio))
        assert loaded.timestep_index.index.unique().tolist() == [number]
    # The ranges differ: those of the first step give other outputs in the last one.
    expected = outputs(loaded, FLUX)
    loaded.timestep_index.timesteps[1:] = -1e6
    assert not torch.equal(outputs(loaded, FLUX)[-1], expected[-1])


def without_folds(name: str) -> nn.Module:
    """Make an example all of whose linears divide their input themselves."""
    model = explored_example(name)
    explored = architecture_of(model)
    sites = tuple(replace(site, folds=()) for site in explored.discovery.sites)
    describe(model, replace(explored, discovery=replace(explored.discovery, sites=sites)))
    return model


def test_values_are_divided_where_what_reads_them_divides(tmp_path):
    model = quantised(FLUX, "smoothquant", without_folds(FLUX), **STATIC)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    # Linears are expanded by the first call.
    assert torch.equal(outputs(loaded, FLUX), outputs(model, FLUX))
    name = "transformer_blocks.0.attn"
    factors = loaded.get_submodule(name).operands.factors
    assert torch.equal(factors, loaded.get_submodule(f"{name}.to_out.0").computing.smooth)
    assert not torch.equal(factors, torch.ones_like(factors))


def test_ranges_are_written_as_checkpoints_have_them(tmp_path):
    model = quantised(PIXART, "tfmq-dm", **SHORT)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name, steps = "transformer_blocks.0.attn1", len(RATIOS)
    assert tensors[f"{name}.operands.ranges"].shape == (4, 2, steps)
    assert tensors[f"{name}.to_q.act"].shape == (2, steps)
    assert [key for key in tensors if "timesteps" in key] == ["timestep_index.timesteps"]
    entry = {f"{name}.operands": tensors[f"{name}.operands.ranges"],
             "timesteps": tensors["timestep_index.timesteps"]}
    operands = model.get_submodule(name).operands
    read = read_operands(entry, name, 4, None, has_powers=False)
    assert torch.equal(read.value.scale, operands.value.scale)
    assert torch.equal(read.probabilities.zero, operands.probabilities.zero)


def test_bfloat16_leaves_ranges_and_timesteps_as_they_are(tmp_path):
    model = quantised(PIXART, "tfmq-dm", **SHORT)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for part in ("timestep_index", "transformer_blocks.1.attn1.operands"):
        saved, read = (dict(whole.get_submodule(part).named_buffers()) for whole in (model, loaded))
        assert saved.keys() == read.keys() != set()
        assert all(torch.equal(saved[key], read[key]) for key in saved)


def test_a_folder_of_the_first_version_is_read(tmp_path):
    model = quantised(PIXART, "rtn")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    configuration = json.loads(path.read_text())
    for key in ("operands", "clock"):
        del configuration["quantization_config"]["stored"][key]
    path.write_text(json.dumps(configuration))
    assert torch.equal(output(type(model).from_pretrained(tmp_path), PIXART), output(model, PIXART))


def without(tensor: str, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[tensor]
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("tensor", [
    "timestep_index.timesteps", "transformer_blocks.1.attn2.operands.ranges"])
def test_a_damaged_folder_is_refused(tensor, tmp_path):
    model = quantised(PIXART, "tfmq-dm", **SHORT)
    model.save_pretrained(tmp_path)
    without(tensor, tmp_path)
    with pytest.raises(ditas.UserError, match="do not fit its quantization_config") as error:
        type(model).from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_fresh_process_loads_it(tmp_path):
    model = quantised(FLUX, "ptq4dm", act_steps="each", attention="uniform")
    model.save_pretrained(tmp_path)
    call = call_at(FLUX, RATIOS[1])
    torch.save(call, tmp_path / "call.pt")
    in_a_fresh_process(LOAD_MODEL, *(str(tmp_path / name) for name in ("", "call.pt", "output.pt")))
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "output.pt"), model(**call)[0])
