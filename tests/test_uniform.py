import itertools

import numpy as np
import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.checkpoint.tensors import pack, unpack
from quant.numerics.uniform import Quantized, QuantSpec, fake_quantize, grouped, quantize
from quant.weights.two_level import fused_least_errors, least_errors

specs = st.builds(QuantSpec, bits=st.integers(2, 8), granularity=st.sampled_from(["tensor", "image", "token", "channel"]), group=st.just(0))
group_specs = st.builds(QuantSpec, bits=st.integers(2, 8), granularity=st.just("group"), group=st.sampled_from([1, 2, 4, 64]))
published_specs = st.one_of(
    st.builds(QuantSpec, bits=st.integers(2, 8), granularity=st.just("strided"), group=st.sampled_from([1, 2, 4]), convention=st.just("published")),
    st.builds(QuantSpec, bits=st.integers(2, 8), granularity=st.just("tensor"), group=st.just(0), convention=st.just("published")))


@st.composite
def matrices(draw, lead: int = 2):
    """Random shapes and scales with random offsets; some rows or columns constant or zero."""
    shape = [draw(st.integers(1, 4)) for _ in range(lead - 2)] + [4 * draw(st.integers(1, 8)), 4 * draw(st.integers(1, 8))]
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    x = rng.standard_normal(shape) * 10.0 ** draw(st.integers(-6, 6)) * 10.0 ** rng.uniform(-1, 1, shape[-1:])
    x += draw(st.sampled_from([0.0, 1.0, -5.0])) * np.abs(x).max()
    for axis, kind in draw(st.lists(st.tuples(st.sampled_from([-1, -2]), st.sampled_from(["zero", "constant"])), max_size=2)):
        index = [slice(None)] * lead
        index[axis] = draw(st.integers(0, shape[axis] - 1))
        x[tuple(index)] = 0.0 if kind == "zero" else x.flat[0]
    return torch.tensor(x, dtype=torch.float32)


def steps_off(x: torch.Tensor, q: Quantized) -> torch.Tensor:
    """Round-trip error in units of each group's scale, with float32 rounding of values and zero points taken off."""
    view, _ = grouped(x.double(), q.spec)
    back, _ = grouped(q.dequantize().double(), q.spec)
    rounding = 4e-7 * (view.abs() + q.zero.abs() * q.scale)
    return ((view - back).abs() - rounding).clamp(min=0) / q.scale.double()


@settings(max_examples=150)
@given(matrices(3), st.one_of(specs, group_specs))
def test_round_trip_stays_within_half_a_step(x, spec):
    q = quantize(x, spec)
    assert int(q.codes.max()) <= spec.top
    assert q.zero.min() >= 0 and q.zero.max() <= spec.top and torch.equal(q.zero, q.zero.round())
    assert steps_off(x, q).max() <= 0.5 + 1e-3
    assert torch.equal(fake_quantize(x, spec), q.dequantize())


@settings(max_examples=150)
@given(matrices(2), published_specs)
def test_published_round_trip_stays_within_one_and_a_half_steps(x, spec):
    q = quantize(x, spec)
    assert int(q.codes.max()) <= spec.top
    assert steps_off(x, q).max() <= 1.5 + 1e-3


@pytest.mark.parametrize("convention", ["affine", "published"])
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
    out = fake_quantize(torch.tensor(values["weight"]), QuantSpec(bits, "strided", 32, "published"))
    assert np.allclose(out, values[f"weight_w{bits}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_published_activations_match_golden(bits):
    values = golden("quantizers")
    out = fake_quantize(torch.tensor(values["act"]), QuantSpec(bits, "tensor", convention="published"))
    assert np.allclose(out, values[f"act_a{bits}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 8])
def test_affine_rounding_is_that_of_pytorch(bits):
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(bits))
    q = quantize(x, QuantSpec(bits, "channel"))
    theirs = torch.fake_quantize_per_channel_affine(x, q.scale.flatten(), q.zero.flatten().int(), 0, 0, 2 ** bits - 1)
    assert torch.allclose(q.dequantize(), theirs, atol=1e-6)
    span = x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    assert torch.allclose(q.scale.flatten(), span / (2 ** bits - 1))


def test_granularities_share_what_they_say():
    x = torch.randn(3, 5, 64)
    counts = {"tensor": 1, "image": 3, "token": 15, "group": 60}
    for granularity, count in counts.items():
        assert quantize(x, QuantSpec(8, granularity, 16)).scale.numel() == count
    w = torch.randn(96, 20)
    strided = quantize(w, QuantSpec(4, "strided", 32, "published"))
    for j, r in ((0, 0), (7, 2), (19, 1)):  # rows 3 apart of one input channel
        group = w[r::3, j]
        assert strided.scale.reshape(3, 20)[r, j] == (group.max() - group.min()) / 16


def test_group_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        quantize(torch.randn(8, 100), QuantSpec(4, "group", 64))
    with pytest.raises(ValueError, match="do not divide"):
        quantize(torch.randn(33, 8), QuantSpec(4, "strided", 32))
    with pytest.raises(ValueError, match="expected one of"):
        QuantSpec(4, "rows")


@given(st.integers(1, 8), st.integers(0, 200), st.integers(0, 2 ** 32 - 1))
def test_packing_is_lossless_and_dense(bits, count, seed):
    codes = torch.tensor(np.random.default_rng(seed).integers(0, 2 ** bits, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, (count,)), codes)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))  # the bit stream as one big integer
    assert int.from_bytes(packed.numpy().tobytes(), "little") == stream


def test_a_stream_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="expected 6 bytes"):
        unpack(torch.zeros(5, dtype=torch.uint8), 4, (3, 4))


def test_scaling_columns_equals_scaling_the_weight():
    w, s = torch.randn(64, 12), torch.rand(12) + 0.5
    q = quantize(w, QuantSpec(4, "strided", 32, "published"))
    assert torch.allclose(q.scale_columns(s).dequantize(), q.dequantize() * s, rtol=1e-6)
    with pytest.raises(ValueError, match="across columns"):
        quantize(w, QuantSpec(4, "channel")).scale_columns(s)


@pytest.mark.parametrize("search", [least_errors, fused_least_errors])
@pytest.mark.parametrize("bits, rows, size", [(2, 3, 8), (4, 5, 24), (8, 2, 16)])
def test_integer_group_scales_are_the_best_of_those_tried(search, bits, rows, size):
    torch.manual_seed(bits)
    groups, cost, spec = torch.randn(rows, 3, size), torch.rand(3, size), QuantSpec(bits, "group", size, "two-level")
    groups[0, 0], groups[0, 1], groups[1, 2] = 0.0, groups[0, 1].abs(), -groups[1, 2].abs()
    steps = groups.abs().amax((1, 2)) * torch.tensor([0.9, 1.1, 1.3])[:, None] / 127
    scales, errors = search(groups, steps, cost, spec)
    for f, o, g in itertools.product(range(3), range(rows), range(3)):
        weight, step = groups[o, g].double(), steps[f, o].double()
        low, high = weight.amin().clamp(max=0), weight.amax().clamp(min=0)
        spanning, tried = int((high - low) / (step * spec.top)), {}
        for k in (min(max(spanning + offset, 1), 127) for offset in (-1, 0, 1, 2)):
            zero = min(round(float(-low / (k * step))), spec.top)
            values = [k * v for v in range(-zero, spec.top - zero + 1) if k * abs(v) <= 127]
            nearest = (weight[:, None] - step * torch.tensor(values, dtype=torch.float64)).square().amin(1)
            tried[k] = float((nearest * cost[g]).sum())
        assert float(errors[f, o, g]) == pytest.approx(min(tried.values()), rel=1e-4, abs=1e-12)
        assert tried[int(scales[f, o, g])] == pytest.approx(min(tried.values()), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("rows, columns, size", [(8, 64, 16), (5, 96, 96), (384, 128, 64)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compiled_group_scales_are_those_of_the_definition(rows, columns, size, bits):
    torch.manual_seed(bits)
    groups, cost = torch.randn(rows, columns // size, size), torch.rand(columns // size, size)
    spec = QuantSpec(bits, "group", size, "two-level")
    steps = (torch.rand(4, rows) * 0.5 + 0.1) / spec.top
    ours, expected = fused_least_errors(groups, steps, cost, spec), least_errors(groups, steps, cost, spec)
    assert torch.allclose(ours[1], expected[1], rtol=1e-5)
    assert (ours[0] != expected[0]).float().mean() < 0.01  # where two scales do equally well
    assert expected[0].unique().numel() > 2
