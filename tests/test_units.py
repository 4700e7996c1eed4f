"""Units of reconstruction: which layers they hold, and that running one is what a model does."""
from dataclasses import replace

import pytest
import torch
from conftest import (
    LATENT_SHAPE,
    TEXT_TOKENS,
    TEXT_WIDTH,
    random_diffusers_dit,
    random_model,
    random_pixart,
    relative,
    scope_linears,
)
from torch import Tensor, nn

from architectures.registry import architecture_of
from architectures.sites import Call, Unit
from architectures.units import units
from config import RECIPES, UNITS
from quant.install import install
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from quant.refinement.unit_chain import UnitChain

IMAGES = 5
FAMILIES = {
    "dit": random_model,
    "diffusers-dit": random_diffusers_dit,
    "pixart": random_pixart,
}
MODULATIONS = {
    "dit": ["blocks.0.adaLN_modulation.1", "blocks.1.adaLN_modulation.1",
            "final_layer.adaLN_modulation.1"],
    "diffusers-dit": ["transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.linear",
                      "proj_out_1"],
    "pixart": ["adaln_single.linear", "adaln_single.emb"],
}


def a_call(family: str) -> Call:
    """Draw a call of several images at different timesteps."""
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(IMAGES, *LATENT_SHAPE, generator=generator)
    timesteps = torch.tensor([900, 20, 400, 20, 0])
    if family == "dit":
        return {"x": latents, "t": timesteps, "y": torch.arange(IMAGES)}
    call = {"hidden_states": latents, "timestep": timesteps}
    if family == "diffusers-dit":
        return {**call, "class_labels": torch.arange(IMAGES)}
    text = torch.randn(IMAGES, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    return {
        **call,
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def outputs_in_a_forward(model: nn.Module, names: list[str], call: Call) -> list[Tensor]:
    """Run the whole model; return the first output of every named module."""
    outputs = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.setdefault(name, output))
        for name in names
    ]
    model(**call)
    for handle in handles:
        handle.remove()
    return [outputs[name] for name in names]


def units_of(model: nn.Module, kind: str) -> list[Unit]:
    return units(architecture_of(model), model, kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_share_no_layer(family):
    model = FAMILIES[family]()
    every = set(scope_linears(model, "all"))
    inner = set(scope_linears(model, "inner"))
    blocks = {name for name in every if "blocks." in name}
    for kind, expected in {"whole": every, "blocks": blocks}.items():
        names = [name for unit in units_of(model, kind) for name in unit.linears]
        assert len(names) == len(set(names))
        assert set(names) == expected
    # PixArt's text comes from no timestep and stands in front of all blocks.
    names = [name for unit in units_of(model, "temporal") for name in unit.linears]
    assert len(names) == len(set(names))
    assert inner - set(names) == {name for name in inner if name.startswith("caption")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_temporal_unit_computes_every_modulation(family):
    model, call = FAMILIES[family](), a_call(family)
    unit = units_of(model, "temporal")[0]
    chain = UnitChain(model, call)
    chain.enter(unit)
    expected = outputs_in_a_forward(model, MODULATIONS[family], call)
    outputs = chain.outputs(unit)
    assert len(outputs) == len(expected)
    for output, wanted in zip(outputs, expected):
        assert relative(output, wanted) < 1e-5


@pytest.mark.parametrize("batch", [2, 32])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(UNITS))
def test_units_run_one_after_the_other_are_the_model(family, kind, batch, monkeypatch):
    monkeypatch.setattr("config.reconstruction_batch", batch)
    model, call = FAMILIES[family](), a_call(family)
    chain, units_in_order = UnitChain(model, call), units_of(model, kind)
    seen = {}
    for unit in units_in_order:
        chain.enter(unit)
        outputs = chain.outputs(unit)
        chain.leave(unit, outputs)
        if unit.entrance:
            seen[unit.entrance] = outputs[0]
    expected = outputs_in_a_forward(model, list(seen), call)
    for (name, output), wanted in zip(seen.items(), expected):
        assert relative(output, wanted) < 1e-5, name


def test_images_keep_their_timesteps_on_the_way():
    """Some images of a chain, in any order, are quantised in the ranges of their own steps."""
    float_model, call = random_model(), a_call("dit")
    recipe = replace(RECIPES["tfmq-dm"], weight="nearest")

    def drive(model):
        torch.manual_seed(0)
        for timestep in (900, 400, 20):
            model(torch.randn(2, *LATENT_SHAPE), torch.full((2,), timestep), torch.arange(2))

    result = quantize_model(float_model, recipe, BitWidths(4, 4), drive)
    model = install(random_model(), result.layers, operands=result.operands)
    expected = outputs_in_a_forward(model, ["blocks.0"], call)[0]
    chain, block = UnitChain(model, call), units_of(float_model, "blocks")[0]
    chain.enter(block)
    chosen = torch.tensor([3, 0])
    assert relative(chain.run(block, chosen)[0], expected[chosen]) < 1e-5
    # The timestep tells: the same tokens at another step are quantised otherwise.
    other = outputs_in_a_forward(model, ["blocks.0"], {**call, "t": call["t"].flip(0)})[0]
    assert relative(other[2], expected[2]) < 1e-5
    assert relative(other[0], expected[0]) > 1e-2
