"""Quantised operands of attention: where they are seen, and that compilers keep them."""
from dataclasses import replace

import pytest
import torch
from conftest import LATENT_SHAPE, noise_drive, random_model, relative

from config import RECIPES
from models import DiT
from quant.install import install
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths

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
