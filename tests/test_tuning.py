"""Codes and branches that learn, from end to end, what the float model gives."""
from dataclasses import replace
from statistics import mean

import pytest
import torch
from conftest import bundled_digits, noise_drive, relative
from torch import Tensor, nn

import config
from architectures.registry import architecture_of
from config import RECIPES
from evaluation.metrics import sqnr_db
from quant.activations.quantisers import Activation
from quant.calibration.trajectory import record
from quant.install import install
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import Quantized
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from quant.refinement.tuned_linear import TunedLinear
from quant.refinement.tuning import noise_to_signal_db, tune
from quant.weights.low_rank import LowRankWeight
from quant.weights.rounding import nearest_quantizer

GROUP, ROWS, COLUMNS, RANK = 4, 3, 8, 2
TOKENS = Activation(QuantSpec(8, "token", 0))
PLUS = RECIPES["ditas-plus"]
W3A8 = BitWidths(3, 8)


def two_level(weight: Tensor, bits: int) -> Quantized:
    spec = QuantSpec(bits, "group", GROUP, "two-level")
    return nearest_quantizer(spec, None, "minmax")(weight, None)


def random_layer(bits: int) -> QuantizedLayer:
    torch.manual_seed(bits)
    branch = torch.randn(ROWS, RANK), torch.randint(-127, 128, (RANK, COLUMNS)).float()
    weight = LowRankWeight(two_level(torch.randn(ROWS, COLUMNS), bits), *branch)
    return QuantizedLayer(weight, TOKENS, Smoothing(torch.rand(COLUMNS) + 0.5))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_tuned_linear_computes_what_its_layer_computes_before_and_after_learning(bits):
    layer, bias, x = random_layer(bits), torch.randn(ROWS), torch.randn(5, 7, COLUMNS)
    tuned = TunedLinear(layer, bias)
    assert relative(tuned(x), QuantLinear(layer, bias)(x)) < 1e-6

    # Whatever was learned, also far outside of all codes.
    tuned.signed.data += 20 * torch.randn_like(tuned.signed)
    tuned.left.data = torch.randn(ROWS, RANK).bfloat16().float()
    learned = tuned.harden()
    assert relative(tuned(x), QuantLinear(learned, bias)(x)) < 1e-6
    codes, base = learned.weight.base.codes, learned.weight.base
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2 ** bits
    values, _ = base.integers()
    assert values.abs().max() <= 127
    for name in ("scale", "zero", "step"):
        assert torch.equal(getattr(base, name), getattr(layer.weight.base, name))


def test_gradients_pass_through_the_rounding_of_codes_inside_the_range_alone():
    layer = random_layer(4)
    tuned = TunedLinear(layer, None)
    tuned.signed.data += 6 * torch.randn_like(tuned.signed)
    upstream = torch.randn(ROWS, COLUMNS)
    with torch.enable_grad():
        (tuned.weight() * upstream).sum().backward()
    base = layer.weight.base
    inside = (tuned.signed > tuned.low) & (tuned.signed < tuned.high)
    assert inside.any() and not inside.all()
    slope = (upstream * base.step).view_as(tuned.signed) * base.scale
    assert relative(tuned.signed.grad[inside], slope[inside]) < 1e-6
    assert tuned.signed.grad[~inside].abs().max() == 0
    assert relative(tuned.left.grad, upstream @ layer.weight.right.T) < 1e-6


def test_the_loss_is_the_mean_sqnr_of_all_entries():
    target = [torch.randn(3, 4, 5), torch.randn(3, 2)]
    outputs = [value + 10.0 ** -i * torch.randn_like(value) for i, value in enumerate(target)]
    expected = mean(sqnr_db(entry, other) for value, output in zip(target, outputs)
                    for entry, other in zip(value, output))
    assert -noise_to_signal_db(outputs, target).item() == pytest.approx(expected, abs=1e-3)


def test_a_perfect_output_has_a_finite_loss():
    target = [torch.randn(3, 4)]
    assert noise_to_signal_db(target, target).item() == pytest.approx(-120, abs=1e-3)


@pytest.fixture(scope="module")
def quantised():
    """Two blocks of DiT-Digits, quantised; the trajectory that was recorded, and another."""
    with torch.no_grad():
        model = bundled_digits(depth=2)
        sites = architecture_of(model).sites(model, "blocks")
        labels = torch.arange(8)
        layers = quantize_model(model, PLUS, W3A8, noise_drive(5, labels)).layers
        seen, _ = record(model, sites, noise_drive(5, labels))
        torch.manual_seed(1)
        unseen, _ = record(model, sites, noise_drive(5, labels + 1))
        yield model, layers, seen, unseen


def output_sqnr(model: nn.Module, layers: dict[str, QuantizedLayer], calls) -> float:
    """Average the SQNR in dB of every call's output."""
    copy = install(bundled_digits(depth=2), layers)
    return mean(sqnr_db(model(**call), copy(**call)) for call in calls)


def test_tuning_serves_images_that_it_did_not_see(quantised):
    model, layers, _, unseen = quantised
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = replace(PLUS, tuning=100)
    tuned = quantize_model(model, recipe, W3A8, noise_drive(5, torch.arange(8))).layers
    gain = output_sqnr(model, tuned, unseen.calls) - output_sqnr(model, layers, unseen.calls)
    assert gain > 1
    assert tuned.keys() == layers.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    # Weight-only modulation is used and not learned.
    for name, layer in layers.items():
        moved = not torch.equal(tuned[name].weight.dense(), layer.weight.dense())
        assert moved == (layer.act is not None)


def test_what_learning_made_worse_is_given_back_as_it_was(quantised, monkeypatch):
    model, layers, seen, _ = quantised
    monkeypatch.setattr(config, "tuning_rate", 3.0)
    assert tune(model, layers, seen, 5) is layers
