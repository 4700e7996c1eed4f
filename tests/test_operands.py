"""Quantised operands of attention: where they are seen, and that compilers keep them."""
from dataclasses import replace

import pytest
import torch
from conftest import LATENT_SHAPE, noise_drive, random_model, relative
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from config import RECIPES
from errors import UserError
from models import Attention, DiT
from quant.activations.attention import attention_probabilities
from quant.activations.quantisers import Activation
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


class UnfusedAttention(Attention):
    """An attention that multiplies by itself."""

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


def unfused_model() -> DiT:
    """Make a model whose last attention multiplies by itself."""
    model = random_model()
    model.blocks[1].attn.__class__ = UnfusedAttention
    return model


@pytest.mark.parametrize("recipe_name", ["ptq4dit", "repq-vit"])
def test_an_attention_that_multiplies_by_itself_is_refused(recipe_name):
    message = "attention blocks.1.attn never called scaled_dot_product_attention"
    with pytest.raises(ValueError, match=message) as caught:
        quantise(unfused_model(), recipe_name)
    assert "let it, or give attention='none'" in str(caught.value)


def test_it_is_refused_before_weights_are_quantised(monkeypatch):
    def quantise_no_weight(*args):
        raise AssertionError("weights come after the operands")

    monkeypatch.setattr(SmoothFirst, "finish", quantise_no_weight)
    with pytest.raises(ValueError, match="never called scaled_dot_product_attention"):
        quantise(unfused_model(), "ptq4dit")


def test_quantised_operands_that_are_never_used_are_refused():
    """A checkpoint may be sampled from where an attention multiplies by itself."""
    inputs = torch.randn(2, *LATENT_SHAPE), torch.tensor([10, 800]), torch.tensor([0, 10])
    result = quantise(random_model(), "ptq4dit")
    model = install(unfused_model(), result.layers, operands=result.operands)
    with pytest.raises(UserError, match="where they are quantised: let it"):
        model(*inputs)

    model.blocks[1].attn.__class__ = Attention
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


@pytest.mark.parametrize("mask", [
    None,
    torch.randn(1, 1, 5, 5),
    torch.rand(2, 1, 5, 5) > 0.3,
], ids=["none", "added", "of truth values"])
def test_probabilities_are_those_of_pytorch(mask):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask | torch.eye(5, dtype=torch.bool)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.allclose(attention_probabilities(query, key, mask) @ value, expected, atol=1e-5)


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
    assert relative(without(*inputs), expected) > 3e-4

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


STEPS, IMAGES_AT_A_STEP = 3, 4


def quantise_per_step(model: DiT, **changes) -> Result:
    """Quantise at W8A4, with a range per timestep for every activation."""
    recipe = replace(RECIPES["tfmq-dm"], weight="nearest", **changes)
    drive = noise_drive(STEPS, torch.arange(IMAGES_AT_A_STEP // 2))
    return quantize_model(model, recipe, BitWidths(8, 4), drive)


def operands_seen(model: DiT, block: int) -> list[torch.Tensor]:
    """Note what a block's ``qkv`` gives in every call, (N, T, 3D), in a list that grows."""
    seen = []
    model.blocks[block].attn.qkv.register_forward_hook(
        lambda module, inputs, output: seen.append(output))
    return seen


def affine(low: float, high: float) -> tuple[float, float]:
    """Compute scale and zero point of 4 bits for a range, 0 included."""
    scale = (max(high, 0) - min(low, 0)) / 15
    return scale, round(-min(low, 0) / scale)


def test_every_operand_has_the_range_of_each_step():
    """With minima and maxima, the ranges are those of what attention multiplied at the step."""
    model = random_model()
    seen = operands_seen(model, 1)
    result = quantise_per_step(model, act_clip="minmax")
    operands = result.operands["blocks.1.attn"]
    assert len(result.operands) == 2
    for step, output in enumerate(seen[:STEPS]):
        by_head = output.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # (3, N, heads, T, d)
        query, key, value = by_head
        probabilities = (query @ key.transpose(-2, -1) / 4).softmax(-1)
        expected = (query, key, value, probabilities)
        names = ("query", "key", "value", "probabilities")
        for name, values in zip(names, expected):
            act = getattr(operands, name)
            assert act.scale.shape == act.zero.shape == (STEPS,)
            scale, zero = affine(float(values.min()), float(values.max()))
            assert float(act.scale[step]) == pytest.approx(scale, rel=1e-4)
            assert float(act.zero[step]) == zero


def at_one_step(act: Activation, step: int) -> Activation:
    """Take the range of one step out of a quantiser with one for each."""
    return replace(act, scale=act.scale[step], zero=act.zero[step], timesteps=None)


def model_of_one_step(result: Result, step: int, depth: int) -> DiT:
    """Install layers and operands with the ranges of one step alone."""
    layers = {name: replace(layer, act=at_one_step(layer.act, step))
              for name, layer in result.layers.items()}
    operands = {}
    for name, quantisers in result.operands.items():
        acts = {key: at_one_step(getattr(quantisers, key), step)
                for key in ("query", "key", "value", "probabilities")}
        operands[name] = replace(quantisers, **acts)
    return install(random_model(depth=depth), layers, operands=operands)


def test_a_model_with_ranges_per_timestep_is_one_model_for_each():
    result = quantise_per_step(random_model())
    timesteps = result.operands["blocks.0.attn"].timesteps
    assert all(layer.act.scale.shape == (STEPS,) for layer in result.layers.values())
    assert "x_embedder.proj" not in result.layers
    assert "final_layer.linear" not in result.layers
    x, labels = torch.randn(STEPS, *LATENT_SHAPE), torch.tensor([0, 3, 10])
    model = install(random_model(), result.layers, operands=result.operands)
    together = model(x, timesteps, labels)

    models = [model_of_one_step(result, step, depth=2) for step in range(STEPS)]
    alone = torch.cat([models[step](x[[step]], timesteps[[step]], labels[[step]])
                       for step in range(STEPS)])
    swapped = torch.cat([models[step - 1](x[[step]], timesteps[[step]], labels[[step]])
                         for step in range(STEPS)])
    # A code may flip where a value lies on a rounding tie; other ranges move far more.
    error = relative(together, alone)
    assert error < 2e-2
    assert relative(swapped, alone) > 5 * max(error, 1e-3)


def test_compiled_blocks_follow_the_timestep():
    """What is compiled at one timestep uses the ranges of the next one there."""
    torch.compiler.reset()
    result = quantise_per_step(random_model(depth=1))
    x, labels = torch.randn(2, *LATENT_SHAPE), torch.tensor([0, 10])
    model = install(random_model(depth=1), result.layers, operands=result.operands)
    steps = [timestep.expand(2) for timestep in result.operands["blocks.0.attn"].timesteps]
    expected = [model(x, timesteps, labels) for timesteps in steps]
    stale = model_of_one_step(result, 0, depth=1)(x, steps[-1], labels)
    for block in model.blocks:
        block.compile()
    errors = [relative(model(x, timesteps, labels), output)
              for timesteps, output in zip(steps, expected)]
    # At 4 bits a flip on a rounding tie shows.
    assert max(errors) < 2e-2
    assert relative(stale, expected[-1]) > 5 * max(*errors, 1e-3)


def test_embedding_alone_has_ranges_per_timestep():
    result = quantise_per_step(random_model(), act_steps="embedding")
    for name, layer in result.layers.items():
        per_image = "adaLN" in name or name.startswith("t_embedder")
        assert (layer.act.timesteps is not None) == per_image
    for operands in result.operands.values():
        assert operands.timesteps is None
