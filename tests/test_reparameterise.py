"""RepQ-ViT: one scale for all channels gives the codes of one per channel."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import bundled_digits, checkpoint_header, noise_drive, random_model, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from config import RECIPES
from diffusion import ImageNoise, make_schedule
from diffusion.generate import guided_drive
from quant.activations.quantisers import Activation
from quant.balancing.reparameterise import PerChannel, channel_ranges, reparameterize
from quant.checkpoint import save
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.ranges import static_codes
from quant.numerics.smoothing import Smoothing
from quant.numerics.spec import QuantSpec
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from quant.weights.low_rank import without_branch
from quant.weights.rounding import quantize_weight


def activations(seed: int, rows: int = 64, channels: int = 24) -> torch.Tensor:
    """Channels that differ a hundredfold in spread, some far off 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, channels)) * 10 ** rng.uniform(-1, 1, channels)
    offsets = 20 * rng.standard_normal(channels) * (rng.random(channels) < 0.3)
    return torch.tensor(x + offsets, dtype=torch.float32)


def codes_of(x, changed, spec):
    """The codes of inputs that are shifted, divided and quantised in one range for all."""
    inputs = (x + changed.shift) / changed.smooth
    return static_codes(inputs, changed.scale, changed.zero, spec) + changed.zero


@settings(max_examples=60)
@given(st.integers(4, 8), st.integers(0, 2 ** 32 - 1))
def test_one_scale_gives_the_codes_of_one_per_channel(bits, seed):
    spec, x = QuantSpec(bits, "tensor"), activations(seed)
    # Ranges that the other rows may exceed.
    scale, zero = channel_ranges(x[:48], spec, "minmax")
    changed = reparameterize(scale, zero, spec)
    steps = x.double().numpy() / scale.double().numpy()
    expected = np.clip(np.round(steps) + zero.numpy(), 0, spec.top)
    codes = codes_of(x, changed, spec)
    # Elsewhere float32 may round the other way.
    sure = np.abs(steps % 1 - 0.5) > 2e-3
    assert sure.mean() > 0.98
    assert np.array_equal(codes.numpy()[sure], expected[sure])
    assert changed.scale.dim() == changed.zero.dim() == 0
    assert 0 <= changed.zero <= spec.top and changed.zero == changed.zero.round()


@settings(max_examples=30)
@given(st.integers(0, 2 ** 32 - 1))
def test_the_linear_computes_the_same(seed):
    spec, x = QuantSpec(8, "tensor"), activations(seed)
    weight, bias = torch.randn(16, 24), torch.randn(16)
    scale, zero = channel_ranges(x, spec, "minmax")
    changed = reparameterize(scale, zero, spec)
    rounded = quantize_weight(weight * changed.smooth, QuantSpec(8, "channel"))
    act = Activation(QuantSpec(16, "tensor"))
    layer = QuantizedLayer(without_branch(rounded), act, Smoothing(changed.smooth, changed.shift))
    expected_weight = (rounded.dequantize() / changed.smooth).double()
    expected = F.linear(x.double(), expected_weight, bias.double())
    assert relative(QuantLinear(layer, layer.bias(bias))(x), expected) < 1e-4
    assert relative(QuantLinear(layer, layer.bias(None))(x), expected - bias.double()) < 1e-4


def published_output(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, zero: np.ndarray,
    spec: QuantSpec,
) -> np.ndarray:
    """Compute what the published code makes of a LayerNorm's output and the linear behind it.

    In float64. The norm gives ``x / r - b``, whose effect goes into the bias with float weights.
    Only then are weights rounded. The zero point of all is rounded, as ours is.
    """
    low = -zero * scale
    target, center = scale.mean(), np.clip(np.round(zero.mean()), 0, 255)
    r = scale / target
    b = low / r - -center * target
    weight = weight * r
    bias = bias + weight @ b

    codes = np.clip(np.round((x / r - b) / target) + center, 0, 255)
    rounded = quantize_weight(torch.tensor(weight, dtype=torch.float32), spec).dequantize()
    return (codes - center) * target @ rounded.double().numpy().T + bias


@pytest.mark.parametrize("seed", range(3))
def test_a_float_bias_correction_is_the_published_codes(seed):
    weight_spec, spec, x = QuantSpec(4, "channel"), QuantSpec(8, "tensor"), activations(seed)
    torch.manual_seed(seed)
    linear = torch.nn.Linear(24, 16)
    scale, zero = channel_ranges(x, spec, "minmax")
    changed = reparameterize(scale, zero, spec)
    rounded = quantize_weight(linear.weight * changed.smooth, weight_spec)
    act = Activation(spec, changed.scale, changed.zero)
    smoothing = Smoothing(changed.smooth, changed.shift)
    outputs, errors = {}, {}
    exact = linear(x)
    for correction, offset in (("float", linear.weight @ changed.shift), ("quantised", None)):
        layer = QuantizedLayer(without_branch(rounded), act, smoothing, offset=offset)
        outputs[correction] = QuantLinear(layer, layer.bias(linear.bias))(x)
        errors[correction] = relative(outputs[correction], exact)

    arrays = [value.detach().double().numpy() for value in (x, linear.weight, linear.bias)]
    expected = published_output(*arrays, scale.double().numpy(), zero.double().numpy(), weight_spec)
    # Codes of values on a tie may differ.
    assert relative(outputs["float"], expected) < 1e-3
    # Inputs are far off 0 in some channels: the rounded weight should not multiply that.
    assert errors["float"] < 0.85 * errors["quantised"]


def test_the_recipe_corrects_biases_with_float_weights_and_the_file_keeps_it(tmp_path):
    model, name = bundled_digits(depth=2), "blocks.1.mlp.fc1"
    drive = noise_drive(3, torch.arange(4))
    recipe = RECIPES["repq-vit"]
    assert recipe.bias_correction == "float"
    result = quantize_model(model, recipe, BitWidths(4, 8), drive)
    layer = result.layers[name]
    linear = model.get_submodule(name)
    expected = linear.bias - linear.weight @ layer.smoothing.shift
    assert torch.equal(layer.bias(linear.bias), expected)

    path = tmp_path / "repq.safetensors"
    save(path, model, result, checkpoint_header("repq-vit"))
    with safe_open(path, framework="pt") as file:
        stored = file.get_tensor(f"{name}.offset")
    assert torch.equal(stored, layer.offset)

    other = replace(recipe, bias_correction="quantised")
    without = quantize_model(model, other, BitWidths(4, 8), drive).layers[name]
    assert without.offset is None
    shifted = without.weight.dense() @ (without.smoothing.shift / without.smoothing.factors)
    assert torch.allclose(without.bias(linear.bias), linear.bias - shifted)


def test_channel_ranges_are_used_to_the_full_even_off_zero():
    x = torch.stack([torch.linspace(5, 7, 256), torch.linspace(-100, -99, 256)], 1)
    spec = QuantSpec(8, "tensor")
    scale, zero = channel_ranges(x, spec, "minmax")
    assert np.allclose(scale, [2 / 255, 1 / 255], rtol=1e-5)
    changed = reparameterize(scale, zero, spec)
    signed = static_codes((x + changed.shift) / changed.smooth, changed.scale, changed.zero, spec)
    back = signed * changed.scale * changed.smooth - changed.shift
    # Half a step, and another half at one end where the zero point was rounded.
    assert ((back - x).abs() <= 1.01 * scale).all()


def test_constant_channels_take_the_others_mean_scale():
    low, high = torch.tensor([-1.0, 0.0, 3.0, -4.0]), torch.tensor([1.0, 0.0, 3.0, 0.0])
    spec = QuantSpec(8, "tensor")
    scale, zero = PerChannel(spec).parameters(low, high)
    assert np.allclose(scale, np.array([2, 3, 3, 4]) / 255, rtol=1e-6)
    assert np.allclose(reparameterize(scale, zero, spec).scale, 3 / 255)
    scale, zero = PerChannel(spec).parameters(torch.zeros(3), torch.zeros(3))
    assert torch.equal(scale, torch.ones(3))
    assert torch.equal(zero, torch.zeros(3))


@pytest.mark.parametrize("bits", [4, 8])
def test_channels_cut_at_percentiles_are_those_of_the_published_code(bits):
    spec, x = QuantSpec(bits, "tensor"), activations(bits, rows=3000, channels=16)
    # Tails to cut.
    rng = np.random.default_rng(0)
    tails = rng.choice([1.0, 8.0], (3000, 1), p=[0.998, 0.002])
    x = x * torch.tensor(tails, dtype=torch.float32)
    scale, zero = channel_ranges(x.view(30, 100, 16), spec, "percentile")
    cuts = []
    for i, values in enumerate(x.double().numpy().T):
        tried = []
        for share in (0.999, 0.9999, 0.99999):
            low, high = np.quantile(values, [1 - share, share])
            step = (high - low) / spec.top
            center = np.round(-low / step)
            codes = np.clip(np.round(values / step) + center, 0, spec.top)
            error = ((codes - center) * step - values) ** 2
            tried.append((error.mean(), step, center, share))
        _, step, center, share = min(tried, key=lambda entry: entry[0])
        # torch.quantile places quantiles in float32.
        assert np.isclose(scale[i], step, rtol=1e-3) and abs(zero[i] - center) <= 1
        cuts.append(share)
    assert bits == 8 or min(cuts) == 0.999  # something was cut
    assert (channel_ranges(x, spec, "minmax")[0] >= scale).all()


def test_the_recipe_takes_both_kinds_of_ranges():
    model, results = random_model(), {}
    for clip in ("minmax", "percentile"):
        noise = ImageNoise(0, range(16), (4, 8, 8))
        labels = torch.arange(16) % 10
        drive = guided_drive(make_schedule("10"), noise(), noise, labels, 1.5)
        recipe = replace(RECIPES["repq-vit"], act_clip=clip)
        results[clip] = quantize_model(model, recipe, BitWidths(4, 8), drive)
    for name in ("blocks.1.attn.qkv", "blocks.1.mlp.fc1"):
        whole = results["minmax"].layers[name]
        cut = results["percentile"].layers[name]
        assert cut.act.scale < whole.act.scale
        # The channels' own scales.
        own = cut.smoothing.factors * cut.act.scale
        widest = whole.smoothing.factors * whole.act.scale
        assert (own <= widest * 1.0001).all()
    for name, whole in results["minmax"].operands.items():
        cut = results["percentile"].operands[name]
        assert cut.probabilities.scale < whole.probabilities.scale <= 1
