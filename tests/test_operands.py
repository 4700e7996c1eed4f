"""Quantised operands of attention: where they are seen, and that compilers keep them."""
from dataclasses import replace

import pytest
import torch
from conftest import LATENT_SHAPE, noise_drive, random_model, relative
from torch.nn.functional import scaled_dot_product_attention

from config import RECIPES
from errors import UserError
from models import DiT
from quant.install import install
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from quant.weights.parts import SmoothFirst

IMAGES = 2
DRIVE_STEPS = 2


def quantise(model: DiT, recipe_name: str, **changes) -> Result:
    """Quantise at W4A8, with weights to the nearest code."""
    recipe = replace(RECIPES[recipe_name], weight="nearest", **changes)
    drive = noise_drive(DRIVE_STEPS, torch.arange(IMAGES))
    return quantize_model(model, recipe, BitWidths(4, 8), drive)


def unfused_model() -> DiT:
    """Make a model whose last attention multiplies by itself, as timm's does if told so."""
    model = random_model()
    model.blocks[1].attn.fused_attn = False
    return model


@pytest.mark.parametrize("recipe_name", ["ptq4dit", "repq-vit"])
def test_an_attention_that_multiplies_by_itself_is_refused(recipe_name):
    message = "attention blocks.1.attn never called scaled_dot_product_attention"
    with pytest.raises(ValueError, match=message) as caught:
        quantise(unfused_model(), recipe_name)
    assert "TIMM_FUSED_ATTN=1" in str(caught.value)
    assert "--attention none" in str(caught.value)


def test_it_is_refused_before_weights_are_quantised(monkeypatch):
    def quantise_no_weight(*args):
        raise AssertionError("weights come after the operands")

    monkeypatch.setattr(SmoothFirst, "finish", quantise_no_weight)
    with pytest.raises(ValueError, match="never called scaled_dot_product_attention"):
        quantise(unfused_model(), "ptq4dit")


def test_quantised_operands_that_are_never_used_are_refused():
    """A checkpoint may be sampled from where timm multiplies by itself."""
    inputs = torch.randn(2, *LATENT_SHAPE), torch.tensor([10, 800]), torch.tensor([0, 10])
    result = quantise(random_model(), "ptq4dit")
    model = install(unfused_model(), result.layers, operands=result.operands)
    with pytest.raises(UserError, match="TIMM_FUSED_ATTN=1"):
        model(*inputs)

    model.blocks[1].attn.fused_attn = True
    expected = install(random_model(), result.layers, operands=result.operands)(*inputs)
    assert torch.equal(model(*inputs), expected)


def test_an_error_inside_an_attention_stays_what_it_was(recwarn):
    result = quantise(random_model(depth=1), "ptq4dit")
    model = install(random_model(depth=1), result.layers, operands=result.operands)

    def fail(linear, inputs):
        raise ArithmeticError("not enough numbers")

    model.blocks[0].attn.qkv.register_forward_pre_hook(fail)
    query = torch.randn(1, 2, 3, 4)
    before = scaled_dot_product_attention(query, query, query)
    with pytest.raises(ArithmeticError, match="not enough numbers"):
        model(torch.randn(2, *LATENT_SHAPE), torch.tensor([10, 800]), torch.tensor([0, 10]))
    assert not [warning for warning in recwarn if "silenced" in str(warning.message)]
    # Nothing stands in for the function any more.
    assert torch.equal(scaled_dot_product_attention(query, query, query), before)


def test_it_is_accepted_where_operands_stay_float():
    result = quantise(unfused_model(), "ptq4dit", attention="none")
    assert result.operands == {}
    assert len(result.layers) > 0


@pytest.mark.parametrize("recipe_name", ["ptq4dit", "repq-vit"])
def test_compiled_blocks_quantise_operands_too(recipe_name):
    """A compiler sees through the interception: a block without operands would differ by far."""
    torch.compiler.reset()
    result = quantise(random_model(depth=1), recipe_name)
    inputs = torch.randn(2, *LATENT_SHAPE), torch.tensor([10, 800]), torch.tensor([0, 10])
    without = install(random_model(depth=1), result.layers)
    model = install(random_model(depth=1), result.layers, operands=result.operands)
    expected = model(*inputs)
    assert relative(without(*inputs), expected) > 1e-3

    for block in model.blocks:
        block.compile()
    assert relative(model(*inputs), expected) < 1e-4


def test_reparameterised_ranges_leave_ranges_per_timestep_alone():
    """RepQ-ViT's ranges and TFMQ-DM's are those of different sites."""
    result = quantise(random_model(depth=1), "repq-vit", act_steps="embedding", scope="adaln")
    modulation = result.layers["blocks.0.adaLN_modulation.1"].act
    assert modulation.scale.shape == (DRIVE_STEPS,)
    assert modulation.timesteps.shape == (DRIVE_STEPS,)

    uniform = quantise(random_model(depth=1), "repq-vit", scope="adaln")
    assert uniform.layers["blocks.0.adaLN_modulation.1"].act.timesteps is None
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc1"):
        assert result.layers[name].act == uniform.layers[name].act
        assert result.layers[name].act.timesteps is None
