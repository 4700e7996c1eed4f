"""Uniform quantisers: round trips, ranges, granularities, and what is refused."""
import numpy as np
import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import Quantized, fake_quantize, grouped, quantize

specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["tensor", "image", "token", "channel"]),
    group=st.just(0),
    convention=st.sampled_from(["affine", "free"]),
)
group_specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    granularity=st.just("group"),
    group=st.sampled_from([1, 2, 4, 64]),
    convention=st.sampled_from(["affine", "free"]),
)
published_weights = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    granularity=st.just("strided"),
    group=st.sampled_from([1, 2, 4]),
    convention=st.just("published"),
)
published_activations = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    granularity=st.just("tensor"),
    group=st.just(0),
    convention=st.just("published"),
)


@st.composite
def matrices(draw, lead: int = 2):
    """Random shapes and scales with random offsets; some rows or columns constant or zero."""
    shape = [draw(st.integers(1, 4)) for _ in range(lead - 2)]
    shape += [4 * draw(st.integers(1, 8)), 4 * draw(st.integers(1, 8))]
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    x = rng.standard_normal(shape)
    x = x * 10.0 ** draw(st.integers(-6, 6)) * 10.0 ** rng.uniform(-1, 1, shape[-1:])
    x += draw(st.sampled_from([0.0, 1.0, -5.0])) * np.abs(x).max()
    special = st.tuples(st.sampled_from([-1, -2]), st.sampled_from(["zero", "constant"]))
    for axis, kind in draw(st.lists(special, max_size=2)):
        index = [slice(None)] * lead
        index[axis] = draw(st.integers(0, shape[axis] - 1))
        x[tuple(index)] = 0.0 if kind == "zero" else x.flat[0]
    return torch.tensor(x, dtype=torch.float32)


def steps_off(x: torch.Tensor, q: Quantized) -> torch.Tensor:
    """Round-trip error in units of each group's scale.

    What float32 rounding of values and zero points adds is taken off.
    """
    view, _ = grouped(x.double(), q.spec)
    back, _ = grouped(q.dequantize().double(), q.spec)
    rounding = 4e-7 * (view.abs() + q.zero.abs() * q.scale)
    return ((view - back).abs() - rounding).clamp(min=0) / q.scale.double()


@settings(max_examples=150)
@given(matrices(3), st.one_of(specs, group_specs))
def test_round_trip_stays_within_half_a_step(x, spec):
    q = quantize(x, spec)
    assert int(q.codes.max()) <= spec.top
    if spec.convention == "affine":
        assert q.zero.min() >= 0 and q.zero.max() <= spec.top
    assert torch.equal(q.zero, q.zero.round())
    assert steps_off(x, q).max() <= 0.5 + 1e-3
    assert torch.equal(fake_quantize(x, spec), q.dequantize())


@settings(max_examples=150)
@given(matrices(2), st.one_of(published_weights, published_activations))
def test_published_round_trip_stays_within_one_and_a_half_steps(x, spec):
    q = quantize(x, spec)
    assert int(q.codes.max()) <= spec.top
    assert steps_off(x, q).max() <= 1.5 + 1e-3


@pytest.mark.parametrize("convention", ["affine", "free", "clamped", "published"])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.0, 1e-30])
def test_constant_groups_come_back(convention, value):
    x = torch.full((8, 16), value)
    for granularity in ("tensor", "channel", "strided"):
        back = quantize(x, QuantSpec(4, granularity, 4, convention)).dequantize()
        assert torch.allclose(back, x, rtol=1e-6, atol=0), (granularity, back[0, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad):
    x = torch.randn(8, 8)
    x[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(x, QuantSpec(4, "channel"))


def test_nan_passes_through_the_fake_quantiser():
    x = torch.randn(2, 4, 8)
    x[1, 2, 3] = float("nan")
    assert torch.isnan(fake_quantize(x, QuantSpec(8, "token"))[1, 2]).any()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_published_weights_match_golden(bits):
    values = golden("quantizers")
    spec = QuantSpec(bits, "strided", 32, "published")
    out = fake_quantize(torch.tensor(values["weight"]), spec)
    assert np.allclose(out, values[f"weight_w{bits}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_published_activations_match_golden(bits):
    values = golden("quantizers")
    spec = QuantSpec(bits, "tensor", convention="published")
    out = fake_quantize(torch.tensor(values["act"]), spec)
    assert np.allclose(out, values[f"act_a{bits}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 8])
def test_affine_rounding_is_that_of_pytorch(bits):
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(bits))
    q = quantize(x, QuantSpec(bits, "channel"))
    scale, zero = q.scale.flatten(), q.zero.flatten().int()
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, 2 ** bits - 1)
    assert torch.allclose(q.dequantize(), theirs, atol=1e-6)
    span = x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    assert torch.allclose(scale, span / (2 ** bits - 1))


@pytest.mark.parametrize("convention, scale, zero, expected", [
    # Sixteen codes between the ends; between 0 and the far end; from 0 on, so that the far end
    # is out of reach.
    ("free", 0.2, -10, [2.0, 2.6, 5.0]),
    ("affine", 1 / 3, 0, [2.0, 8 / 3, 5.0]),
    ("clamped", 0.2, 0, [2.0, 2.6, 3.0]),
])
@pytest.mark.parametrize("sign", [1, -1])
def test_zero_points_of_values_wholly_off_zero_by_hand(convention, scale, zero, expected, sign):
    x = sign * torch.tensor([[2.0, 2.6, 5.0]])
    q = quantize(x, QuantSpec(4, "channel", convention=convention))
    assert q.scale.item() == pytest.approx(scale)
    assert q.zero.item() == (zero if sign == 1 else 15 - zero)
    assert torch.allclose(q.dequantize(), sign * torch.tensor([expected]))
    assert torch.equal(fake_quantize(x, q.spec), q.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("convention", ["free", "clamped"])
def test_zero_points_follow_the_equations(convention, bits):
    """Equation 1 of Q-DiT with a rounded zero point, and its code, which clamps that."""
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(64, 32)) + rng.normal(scale=3, size=(64, 1))
    top = 2 ** bits - 1
    scale = (x.max(1, keepdims=True) - x.min(1, keepdims=True)) / top
    zero = np.round(-x.min(1, keepdims=True) / scale)
    assert (zero < 0).any() and (zero > top).any()
    if convention == "clamped":
        zero = zero.clip(0, top)
    expected = scale * ((np.round(x / scale) + zero).clip(0, top) - zero)
    out = fake_quantize(torch.tensor(x), QuantSpec(bits, "channel", convention=convention))
    assert np.allclose(out, expected)


@pytest.mark.parametrize("convention", ["affine", "free", "clamped"])
def test_a_short_last_group_is_quantised_like_any_other(convention):
    x = torch.randn(6, 5, 100) + 1
    spec = QuantSpec(4, "group", 48, convention, tail=True)
    parts = []
    for part in x.split(48, -1):
        parts.append(fake_quantize(part, QuantSpec(4, "token", convention=convention)))
    assert torch.equal(fake_quantize(x, spec), torch.cat(parts, -1))
    q = quantize(x, spec)
    assert q.codes.shape == x.shape and q.scale.shape == (6, 5, 3, 1)
    assert torch.equal(q.dequantize(), torch.cat(parts, -1))


def test_granularities_share_what_they_say():
    x = torch.randn(3, 5, 64)
    counts = {"tensor": 1, "image": 3, "token": 15, "group": 60}
    for granularity, count in counts.items():
        assert quantize(x, QuantSpec(8, granularity, 16)).scale.numel() == count
    w = torch.randn(96, 20)
    strided = quantize(w, QuantSpec(4, "strided", 32, "published"))
    scale = strided.scale.reshape(3, 20)
    for j, r in ((0, 0), (7, 2), (19, 1)):
        group = w[r::3, j]  # rows 3 apart of one input channel
        assert scale[r, j] == (group.max() - group.min()) / 16


def test_group_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        quantize(torch.randn(8, 100), QuantSpec(4, "group", 64))
    with pytest.raises(ValueError, match="do not divide"):
        quantize(torch.randn(33, 8), QuantSpec(4, "strided", 32))
    with pytest.raises(ValueError, match="expected one of"):
        QuantSpec(4, "rows")


def test_scaling_columns_equals_scaling_the_weight():
    w, s = torch.randn(64, 12), torch.rand(12) + 0.5
    q = quantize(w, QuantSpec(4, "strided", 32, "published"))
    assert torch.allclose(q.scale_columns(s).dequantize(), q.dequantize() * s, rtol=1e-6)
    with pytest.raises(ValueError, match="across columns"):
        quantize(w, QuantSpec(4, "channel")).scale_columns(s)
