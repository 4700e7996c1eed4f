from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from config import RECIPES
from diffusion import ImageNoise, make_schedule
from quant.activations.quantisers import Activation
from quant.balancing.reparameterise import PerChannel, channel_ranges, reparameterize
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.ranges import static_codes
from quant.numerics.uniform import QuantSpec
from quant.pipeline import Start, quantize_model
from quant.weights.low_rank import without_branch
from quant.weights.rounding import quantize_weight


def activations(seed: int, rows: int = 64, channels: int = 24) -> torch.Tensor:
    """Channels that differ a hundredfold in spread, some far off 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, channels)) * 10 ** rng.uniform(-1, 1, channels)
    return torch.tensor(x + 20 * rng.standard_normal(channels) * (rng.random(channels) < 0.3), dtype=torch.float32)


@settings(max_examples=60)
@given(st.integers(4, 8), st.integers(0, 2 ** 32 - 1))
def test_one_scale_gives_the_codes_of_one_per_channel(bits, seed):
    spec, x = QuantSpec(bits, "tensor"), activations(seed)
    scale, zero = channel_ranges(x[:48], spec, "minmax")  # which the other rows may exceed
    found = reparameterize(scale, zero, spec)
    steps = x.double().numpy() / scale.double().numpy()
    expected = np.clip(np.round(steps) + zero.numpy(), 0, spec.top)
    codes = static_codes((x + found.shift) / found.smooth, found.scale, found.zero, spec) + found.zero
    sure = np.abs(steps % 1 - 0.5) > 2e-3  # elsewhere float32 may round the other way
    assert sure.mean() > 0.98 and np.array_equal(codes.numpy()[sure], expected[sure])
    assert found.scale.dim() == found.zero.dim() == 0 and 0 <= found.zero <= spec.top and found.zero == found.zero.round()


@settings(max_examples=30)
@given(st.integers(0, 2 ** 32 - 1))
def test_the_linear_computes_the_same(seed):
    spec, x = QuantSpec(8, "tensor"), activations(seed)
    weight, bias = torch.randn(16, 24), torch.randn(16)
    found = reparameterize(*channel_ranges(x, spec, "minmax"), spec)
    rounded = quantize_weight(weight * found.smooth, QuantSpec(8, "channel"))
    layer = QuantizedLayer(without_branch(rounded), Activation(QuantSpec(16, "tensor")), found.smooth, shift=found.shift)
    expected = F.linear(x.double(), (rounded.dequantize() / found.smooth).double(), bias.double())
    assert relative(QuantLinear(layer, layer.bias(bias))(x), expected) < 1e-4
    assert relative(QuantLinear(layer, layer.bias(None))(x), expected - bias.double()) < 1e-4


def test_channel_ranges_are_used_to_the_full_even_off_zero():
    x, spec = torch.stack([torch.linspace(5, 7, 256), torch.linspace(-100, -99, 256)], 1), QuantSpec(8, "tensor")
    scale, zero = channel_ranges(x, spec, "minmax")
    assert np.allclose(scale, [2 / 255, 1 / 255], rtol=1e-5)
    found = reparameterize(scale, zero, spec)
    back = static_codes((x + found.shift) / found.smooth, found.scale, found.zero, spec) * found.scale * found.smooth - found.shift
    assert ((back - x).abs() <= 1.01 * scale).all()  # half a step, and another half at one end where the zero point was rounded


def test_constant_channels_take_the_others_mean_scale():
    low, high = torch.tensor([-1.0, 0.0, 3.0, -4.0]), torch.tensor([1.0, 0.0, 3.0, 0.0])
    spec = QuantSpec(8, "tensor")
    scale, zero = PerChannel(spec).parameters(low, high)
    assert np.allclose(scale, np.array([2, 3, 3, 4]) / 255, rtol=1e-6)
    assert np.allclose(reparameterize(scale, zero, spec).scale, 3 / 255)
    scale, zero = PerChannel(spec).parameters(torch.zeros(3), torch.zeros(3))
    assert torch.equal(scale, torch.ones(3)) and torch.equal(zero, torch.zeros(3))


@pytest.mark.parametrize("bits", [4, 8])
def test_channels_cut_at_percentiles_are_those_of_the_published_code(bits):
    spec, x = QuantSpec(bits, "tensor"), activations(bits, rows=3000, channels=16)
    x = x * torch.tensor(np.random.default_rng(0).choice([1.0, 8.0], (3000, 1), p=[0.998, 0.002]), dtype=torch.float32)  # tails to cut
    scale, zero = channel_ranges(x.view(30, 100, 16), spec, "percentile")
    cuts = []
    for i, values in enumerate(x.double().numpy().T):
        found = []
        for share in (0.999, 0.9999, 0.99999):
            low, high = np.quantile(values, [1 - share, share])
            step = (high - low) / spec.top
            centre = np.round(-low / step)
            error = ((np.clip(np.round(values / step) + centre, 0, spec.top) - centre) * step - values) ** 2
            found.append((error.mean(), step, centre, share))
        _, step, centre, share = min(found, key=lambda entry: entry[0])
        assert np.isclose(scale[i], step, rtol=1e-3) and abs(zero[i] - centre) <= 1  # torch.quantile places quantiles in float32
        cuts.append(share)
    assert bits == 8 or min(cuts) == 0.999  # something was cut
    assert (channel_ranges(x, spec, "minmax")[0] >= scale).all()


def test_the_recipe_takes_both_kinds_of_ranges():
    model, found = random_model(), {}
    for clip in ("minmax", "percentile"):
        noise = ImageNoise(0, range(16), (4, 8, 8))
        recipe = replace(RECIPES["repq-vit"], act_clip=clip)
        found[clip] = quantize_model(model, recipe, 4, 8, make_schedule("10"), Start(noise(), noise, torch.arange(16) % 10))
    for name in ("blocks.1.attn.qkv", "blocks.1.mlp.fc1"):
        whole, cut = (found[clip].layers[name] for clip in ("minmax", "percentile"))
        assert cut.act.scale < whole.act.scale
        assert (cut.smooth * cut.act.scale <= whole.smooth * whole.act.scale * 1.0001).all()  # the channels' own scales
    for whole, cut in zip(found["minmax"].operands.values(), found["percentile"].operands.values()):
        assert cut.probabilities.scale < whole.probabilities.scale <= 1
