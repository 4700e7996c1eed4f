from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model

from config import RECIPES
from diffusion import ImageNoise, make_schedule
from diffusion.generate import guided_drive
from download import load_model
from models import DiT_models
from quant.activations.attention import Operands, quantize_operands
from quant.activations.quantisers import Activation, Static, TimestepIndex
from quant.activations.softmax import PowersOfRootTwo
from quant.install import install
from quant.numerics.uniform import QuantSpec
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from quant.refinement.adaround import beta_at, rounding_loss
from quant.refinement.block_chain import BlockChain
from quant.refinement.soft_layers import LearnedStep, SoftLinear, rectified_sigmoid


def digits():
    """The first two blocks of the bundled model."""
    model = load_model("DiT-Digits", DiT_models["DiT-Digits"], 16, 10, None, torch.device("cpu"))
    model.blocks = model.blocks[:2]
    return model


def run(recipe):
    """The model, what quantisation found, and model inputs of the trajectory."""
    model, n, seen = digits(), 8, ([], [], [])
    noise = ImageNoise(0, range(n), (4, 8, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for i, key in enumerate(("x_embedder", "t_embedder", "y_embedder")):
        model.get_submodule(key).register_forward_pre_hook(lambda _, inputs, i=i: seen[i].append(inputs[0]))
    result = quantize_model(
        model, recipe, BitWidths(3, 8),
        guided_drive(make_schedule("5"), noise(), noise, torch.arange(n), 1.5))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return model, result, [torch.cat(parts[:5]) for parts in seen]


@pytest.mark.parametrize("name", ["ptq4dit", "tfmq-dm"])
def test_every_weight_is_rounded_down_or_up_and_blocks_come_nearer(name):
    recipe = replace(RECIPES[name], iterations=150, rounding_rate=0.02)
    model, nearest, inputs = run(replace(recipe, weight="nearest"))
    _, learned, _ = run(recipe)
    changed = 0
    for key, layer in learned.layers.items():
        difference = layer.weight.base.codes.int() - nearest.layers[key].weight.base.codes.int()
        assert difference.abs().max() <= 1
        changed += int((difference != 0).sum())
        if not key.startswith("blocks."):
            assert not difference.any()
            continue
        weight = layer.smoothing.of_weight(model.get_submodule(key).weight)
        quantised = layer.weight.base
        exact = weight / quantised.scale + quantised.zero
        inside = (exact > 0) & (exact < quantised.spec.top)
        assert ((quantised.codes - exact)[inside].abs() < 1).all()
        assert not torch.equal(layer.act.scale, nearest.layers[key].act.scale) and torch.equal(layer.act.zero, nearest.layers[key].act.zero)
    assert changed > 100

    def error(result):
        quantised = install(digits(), result.layers, operands=result.operands)
        call = dict(zip("xty", inputs))
        outputs = BlockChain(quantised, call).outputs(quantised.blocks[0])
        return (outputs - BlockChain(model, call).outputs(model.blocks[0])).norm()
    print(f"{name}: {error(learned) / error(nearest):.3f} of the error of rounding to the nearest")
    assert error(learned) < 0.8 * error(nearest)


def test_relaxed_rounding_is_pushed_to_zero_or_one():
    """The regulariser alone: gradient descent ends where every h is 0 or 1, on the side where it began."""
    torch.manual_seed(0)
    v = torch.nn.Parameter(torch.randn(200))
    begun = (v >= 0).clone()
    with torch.enable_grad():
        optimiser = torch.optim.Adam([v], lr=0.05)
        for i in range(1500):
            optimiser.zero_grad()
            rounding_loss(rectified_sigmoid(v), 20 - 18 * i / 1500).backward()
            optimiser.step()
    h = rectified_sigmoid(v)
    assert ((h < 1e-3) | (h > 1 - 1e-3)).all() and ((h > 0.5) == begun).float().mean() > 0.99
    assert rounding_loss(torch.tensor([0.0, 1.0]), 2.0) == 0 and rounding_loss(torch.tensor([0.5]), 7.0) == 1


def test_the_exponent_falls_from_20_to_2_after_the_warm_up():
    assert beta_at(0, 1000) is None and beta_at(199, 1000) is None
    assert beta_at(200, 1000) == 20 and beta_at(600, 1000) == pytest.approx(11) and beta_at(999, 1000) == pytest.approx(2, abs=0.03)


def test_a_soft_layer_starts_as_the_float_one():
    torch.manual_seed(0)
    _, result, _ = run(replace(RECIPES["ptq4dit"], weight="nearest"))
    model, layer = digits(), result.layers["blocks.0.mlp.fc1"]
    linear, x = model.blocks[0].mlp.fc1, 0.1 * torch.randn(2, 5, 128)
    soft = SoftLinear(linear.weight * layer.smoothing.factors, replace(layer, act=None), linear.bias, None)
    weight = soft.down + soft.step * rectified_sigmoid(soft.v)
    inside = soft.gap == 1
    scale = layer.weight.base.scale
    assert inside.float().mean() > 0.9
    assert ((weight - linear.weight * layer.smoothing.factors).abs() / scale)[inside].max() < 0.011  # h starts at the fraction, cut to 0.01 to 0.99
    assert (soft(x) - linear(x)).norm() < 0.1 * linear(x).norm()


def test_steps_learn_with_the_gradient_of_lsq():
    """d/ds of s * clamp(round(x / s)): round(x / s) - x / s inside the range, its ends outside (Esser et al., 2020)."""
    act = Activation(QuantSpec(4, "tensor"), torch.tensor(0.5), torch.tensor(7.0))
    module, x = LearnedStep(act, None), torch.tensor([[0.3, -1.1, 90.0, -90.0]])
    with torch.enable_grad():
        codes, scale = module(x)
        (codes * scale).sum().backward()
    expected = (round(0.6) - 0.6) + (round(-2.2) + 2.2) + 8 - 7
    assert module.scale.grad.item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(codes, Static(act)(x)[0])


def test_a_range_per_timestep_follows_the_timestep():
    act = Activation(QuantSpec(8, "tensor"), torch.tensor([0.1, 1.0]), torch.tensor([0.0, 100.0]), torch.tensor([900, 10]))
    index = TimestepIndex(act.timesteps)
    index.update(torch.tensor([10, 899, 3]))
    assert index.index.tolist() == [1, 0, 1]
    codes, scale = LearnedStep(act, index)(torch.full((3, 2), 5.04))
    assert scale[:, 0].tolist() == pytest.approx([1.0, 0.1, 1.0]) and codes[:, 0].tolist() == [5, 50, 5]


def test_quantised_attention_without_rounding_is_attention():
    model = random_model()
    attention, x = model.blocks[0].attn, torch.randn(2, 16, 64)
    expected, coarse = attention(x), deepcopy(attention)
    fine = Activation(QuantSpec(16, "tensor"))
    factors = torch.rand(64) + 0.5
    quantize_operands(attention, Operands(fine, fine, fine, fine, factors))
    assert np.allclose(attention(x), expected, atol=1e-5)
    static = Activation(QuantSpec(8, "tensor"), torch.tensor(0.02), torch.tensor(128.0))
    powers = PowersOfRootTwo(8, torch.tensor(1.0))
    quantize_operands(coarse, Operands(static, static, static, powers))
    error = (coarse(x) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.2


def test_a_small_step_does_not_cross_zero(monkeypatch):
    """Adam moves every step by its rate, however small the step is."""
    monkeypatch.setattr("config.step_rate", 10.0)
    _, result, _ = run(replace(RECIPES["ptq4dit"], iterations=3))
    assert all(layer.act.scale > 0 for layer in result.layers.values())
    assert all(act.scale > 0 for each in result.operands.values() for act in (each.query, each.key, each.value, each.probabilities))


def test_a_copy_of_a_model_has_its_own_timestep_index():
    _, result, _ = run(replace(RECIPES["tfmq-dm"], weight="nearest"))
    model = install(digits(), result.layers)
    copy, x = deepcopy(model), torch.randn(1, 4, 8, 8)
    model(x, torch.tensor([999]), torch.tensor([1]))
    assert torch.equal(copy(x, torch.tensor([0]), torch.tensor([1])), model(x, torch.tensor([0]), torch.tensor([1])))
