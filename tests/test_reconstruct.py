"""Rounding that is learned block by block (AdaRound), and attention with quantised operands."""
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import LATENT_SHAPE, bundled_digits, noise_drive, random_model, relative
from torch import Tensor, nn

from config import RECIPES, Recipe
from models import DiT
from quant.activations.attention import Operands, quantize_operands
from quant.activations.quantisers import Activation, Static, TimestepIndex
from quant.activations.softmax import PowersOfRootTwo
from quant.install import install
from quant.layers.quantised import QuantizedLayer
from quant.numerics.uniform import QuantSpec
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from quant.refinement.adaround import beta_at, rounding_loss
from quant.refinement.block_chain import BlockChain
from quant.refinement.soft_layers import LearnedStep, SoftLinear, rectified_sigmoid

STEPS, IMAGES = 5, 8
EMBEDDERS = {"x": "x_embedder", "t": "t_embedder", "y": "y_embedder"}


def two_blocks() -> DiT:
    """Load the first two blocks of the bundled model."""
    return bundled_digits(depth=2)


def keep_arguments(model: DiT) -> dict[str, list[Tensor]]:
    """Note what the model is called with, by argument, in lists that grow."""
    arguments = {name: [] for name in EMBEDDERS}

    def hook_of(name):
        return lambda module, inputs: arguments[name].append(inputs[0])

    for name, embedder in EMBEDDERS.items():
        model.get_submodule(embedder).register_forward_pre_hook(hook_of(name))
    return arguments


def quantise(recipe: Recipe) -> tuple[DiT, Result, dict[str, Tensor]]:
    """Quantise two blocks at W3A8.

    Returns:
        The float model, what quantisation found, and the model's arguments on the trajectory.
    """
    model = two_blocks()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = keep_arguments(model)
    drive = noise_drive(STEPS, torch.arange(IMAGES))
    result = quantize_model(model, recipe, BitWidths(3, 8), drive)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    call = {name: torch.cat(parts[:STEPS]) for name, parts in arguments.items()}
    return model, result, call


def assert_rounded_down_or_up(layer: QuantizedLayer, linear: nn.Module) -> None:
    """Check that every code inside the range is next to the value that it stands for."""
    weight = layer.smoothing.of_weight(linear.weight)
    quantised = layer.weight.base
    exact = weight / quantised.scale + quantised.zero
    inside = (exact > 0) & (exact < quantised.spec.top)
    assert ((quantised.codes - exact)[inside].abs() < 1).all()


def first_block_error(model: DiT, result: Result, call: dict[str, Tensor]) -> float:
    """Measure how far the first block's outputs are from those of the float model."""
    quantised = install(two_blocks(), result.layers, operands=result.operands)
    outputs = BlockChain(quantised, call).outputs(quantised.blocks[0])
    expected = BlockChain(model, call).outputs(model.blocks[0])
    return float((outputs - expected).norm())


@pytest.mark.parametrize("name", ["ptq4dit", "tfmq-dm"])
def test_every_weight_is_rounded_down_or_up_and_blocks_come_nearer(name):
    recipe = replace(RECIPES[name], iterations=150, rounding_rate=0.02)
    model, nearest, call = quantise(replace(recipe, weight="nearest"))
    _, learned, _ = quantise(recipe)
    changed = 0
    for key, layer in learned.layers.items():
        before = nearest.layers[key]
        difference = layer.weight.base.codes.int() - before.weight.base.codes.int()
        assert difference.abs().max() <= 1
        changed += int((difference != 0).sum())
        if not key.startswith("blocks."):
            assert not difference.any()
            continue
        assert_rounded_down_or_up(layer, model.get_submodule(key))
        assert not torch.equal(layer.act.scale, before.act.scale)
        assert torch.equal(layer.act.zero, before.act.zero)
    assert changed > 100

    error = first_block_error(model, learned, call)
    error_of_nearest = first_block_error(model, nearest, call)
    print(f"{name}: {error / error_of_nearest:.3f} of the error of rounding to the nearest")
    assert error < 0.8 * error_of_nearest


def test_relaxed_rounding_is_pushed_to_zero_or_one():
    """The regulariser alone ends where every h is 0 or 1, on the side where it began."""
    torch.manual_seed(0)
    v = nn.Parameter(torch.randn(200))
    began_up = (v >= 0).clone()
    with torch.enable_grad():
        optimiser = torch.optim.Adam([v], lr=0.05)
        for i in range(1500):
            optimiser.zero_grad()
            rounding_loss(rectified_sigmoid(v), 20 - 18 * i / 1500).backward()
            optimiser.step()
    h = rectified_sigmoid(v)
    assert ((h < 1e-3) | (h > 1 - 1e-3)).all()
    assert ((h > 0.5) == began_up).float().mean() > 0.99


def test_the_regulariser_is_0_at_the_ends_and_1_in_the_middle():
    assert rounding_loss(torch.tensor([0.0, 1.0]), 2.0) == 0
    assert rounding_loss(torch.tensor([0.5]), 7.0) == 1


@pytest.mark.parametrize("iteration, beta", [
    (0, None),
    (199, None),
    (200, 20),
    (600, pytest.approx(11)),
    (999, pytest.approx(2, abs=0.03)),
])
def test_the_exponent_falls_from_20_to_2_after_the_warm_up(iteration, beta):
    assert beta_at(iteration, 1000) == beta


def test_a_soft_layer_starts_as_the_float_one():
    torch.manual_seed(0)
    _, result, _ = quantise(replace(RECIPES["ptq4dit"], weight="nearest"))
    layer = result.layers["blocks.0.mlp.fc1"]
    linear = two_blocks().blocks[0].mlp.fc1
    x = 0.1 * torch.randn(2, 5, 128)
    smoothed = linear.weight * layer.smoothing.factors
    soft = SoftLinear(smoothed, replace(layer, act=None), linear.bias, None)
    weight = soft.down + soft.step * rectified_sigmoid(soft.v)
    inside = soft.gap == 1
    assert inside.float().mean() > 0.9
    # h starts at the fraction, cut to 0.01 to 0.99.
    steps_off = (weight - smoothed).abs() / layer.weight.base.scale
    assert steps_off[inside].max() < 0.011
    assert relative(soft(x), linear(x)) < 0.1


def test_steps_learn_with_the_gradient_of_lsq():
    """Check d/ds of ``s clamp(round(x / s))`` by hand (Esser et al., 2020).

    It is ``round(x / s) - x / s`` inside the range, and the range's end outside.
    """
    act = Activation(QuantSpec(4, "tensor"), torch.tensor(0.5), torch.tensor(7.0))
    module = LearnedStep(act, None)
    x = torch.tensor([[0.3, -1.1, 90.0, -90.0]])
    with torch.enable_grad():
        codes, scale = module(x)
        (codes * scale).sum().backward()
    expected = (round(0.6) - 0.6) + (round(-2.2) + 2.2) + 8 - 7
    assert module.scale.grad.item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(codes, Static(act)(x)[0])


def test_a_range_per_timestep_follows_the_timestep():
    scales, zeros = torch.tensor([0.1, 1.0]), torch.tensor([0.0, 100.0])
    act = Activation(QuantSpec(8, "tensor"), scales, zeros, torch.tensor([900, 10]))
    index = TimestepIndex(act.timesteps)
    index.update(torch.tensor([10, 899, 3]))
    assert index.index.tolist() == [1, 0, 1]
    codes, scale = LearnedStep(act, index)(torch.full((3, 2), 5.04))
    assert scale[:, 0].tolist() == pytest.approx([1.0, 0.1, 1.0])
    assert codes[:, 0].tolist() == [5, 50, 5]


def test_attention_of_16_bits_is_attention():
    attention, x = random_model().blocks[0].attn, torch.randn(2, 16, 64)
    expected = attention(x)
    fine = Activation(QuantSpec(16, "tensor"))
    factors = torch.rand(64) + 0.5
    quantize_operands(attention, Operands(fine, fine, fine, fine, factors))
    assert torch.allclose(attention(x), expected, rtol=1e-5, atol=1e-5)


def test_attention_of_8_bits_is_nearly_attention():
    attention, x = random_model().blocks[0].attn, torch.randn(2, 16, 64)
    expected = attention(x)
    static = Activation(QuantSpec(8, "tensor"), torch.tensor(0.02), torch.tensor(128.0))
    powers = PowersOfRootTwo(8, torch.tensor(1.0))
    quantize_operands(attention, Operands(static, static, static, powers))
    assert 1e-4 < relative(attention(x), expected) < 0.2


def test_a_small_step_does_not_cross_zero(monkeypatch):
    """Adam moves every step by its rate, however small the step is."""
    monkeypatch.setattr("config.step_rate", 10.0)
    _, result, _ = quantise(replace(RECIPES["ptq4dit"], iterations=3))
    for layer in result.layers.values():
        assert layer.act.scale > 0
    for operands in result.operands.values():
        assert operands.query.scale > 0
        assert operands.key.scale > 0
        assert operands.value.scale > 0
        assert operands.probabilities.scale > 0


def test_a_copy_of_a_model_has_its_own_timestep_index():
    _, result, _ = quantise(replace(RECIPES["tfmq-dm"], weight="nearest"))
    model = install(two_blocks(), result.layers)
    copy = deepcopy(model)
    x, label = torch.randn(1, *LATENT_SHAPE), torch.tensor([1])
    model(x, torch.tensor([999]), label)
    first = torch.tensor([0])
    assert torch.equal(copy(x, first, label), model(x, first, label))
