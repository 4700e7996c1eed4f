"""How ranges are chosen: against published values, and against trying every range by hand."""
import numpy as np
import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.numerics.ranges import (
    Affine,
    best_range,
    quantize_range,
    static_codes,
    step_ranges,
    tensor_range,
)
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import Quantized, fake_quantize, grouped, quantize

GOLDEN = {key: torch.tensor(value) for key, value in golden("baselines").items()}


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed values, off 0 by a different amount in every row."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, shape)
    offsets = rng.normal(size=(shape[0],) + (1,) * (len(shape) - 1))
    return torch.tensor(values + offsets, dtype=torch.float32)


@pytest.mark.parametrize("group", [16, 32, 48])
@pytest.mark.parametrize("choice, published", [("minmax", "max"), ("shrink", "mse")])
def test_qdit_weights_match_golden(group, choice, published):
    out = quantize_range(GOLDEN["weight"], QuantSpec(4, "group", group), choice).dequantize()
    expected = GOLDEN[f"qdit_weight_asym_w4_g{group}_{published}"]
    assert torch.allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", [16, 32, 48])
def test_qdit_activations_match_golden(group):
    out = fake_quantize(GOLDEN["act"], QuantSpec(8, "group", group))
    assert torch.allclose(out, GOLDEN[f"qdit_act_asym_a8_g{group}"], rtol=0, atol=1e-5)


def test_ptq4dit_quantisers_match_golden():
    quantized = quantize_range(GOLDEN["ptq4dit_weight"], QuantSpec(4, "channel"), "percentile")
    weight = quantized.dequantize()
    assert torch.allclose(weight, GOLDEN["ptq4dit_weight_w4"], rtol=0, atol=1e-5)
    act, spec = GOLDEN["ptq4dit_act"], QuantSpec(8, "tensor")
    scale, zero = tensor_range(act, spec, "percentile")
    assert scale.dim() == zero.dim() == 0 and scale.dtype == zero.dtype == torch.float32
    values = static_codes(act, scale, zero, spec) * scale
    assert torch.allclose(values, GOLDEN["ptq4dit_act_a8"], rtol=0, atol=1e-5)


def least(
    values: np.ndarray, ranges: list[tuple[float, float]], norm: float, top: int
) -> tuple[float, float]:
    """Scale and zero point by trying every range on one group, in double precision."""
    tried = []
    for low, high in ranges:
        scale = (max(high, 0) - min(low, 0)) / top
        zero = np.round(-min(low, 0) / scale)
        codes = np.clip(np.round(values / scale) + zero, 0, top)
        error = np.abs((codes - zero) * scale - values) ** norm
        tried.append((error.mean(), scale, zero))
    return min(tried, key=lambda entry: entry[0])[1:]


@pytest.mark.parametrize("granularity, group", [
    ("channel", 0),
    ("group", 32),
    ("strided", 8),
    ("tensor", 0),
    ("image", 0),
])
@pytest.mark.parametrize("bits", [3, 6])
def test_every_group_gets_the_best_of_its_ranges(granularity, group, bits):
    spec = QuantSpec(bits, granularity, group)
    shape = (3, 16, 64) if granularity == "image" else (16, 64)
    view, dims = grouped(spread(*shape, seed=bits), spec)
    shrunk = torch.stack(best_range(view, dims, Affine(spec), "shrink"))
    far = torch.stack(best_range(view, dims, Affine(spec), "shrink-far"))
    cut = torch.stack(best_range(view, dims, Affine(spec), "percentile"))
    assert shrunk.shape == cut.shape == (2, *view.amin(dims, keepdim=True).shape)
    # One group a row.
    shared = [dim % view.dim() for dim in dims]
    kept = [dim for dim in range(view.dim()) if dim not in shared]
    groups = view.numpy().transpose(*kept, *sorted(shared)).astype(np.float64)
    for i, values in enumerate(groups.reshape(shrunk[0].numel(), -1)):
        shares = 1 - np.arange(100) / 1000
        ends = [(values.min() * share, values.max() * share) for share in shares]
        expected = least(values, ends, 2.4, spec.top)
        assert np.allclose(shrunk.flatten(1)[:, i], expected, rtol=1e-5)
        shares = 1 - np.arange(80) / 100
        ends = [(values.min() * share, values.max() * share) for share in shares]
        expected = least(values, ends, 2.4, spec.top)
        assert np.allclose(far.flatten(1)[:, i], expected, rtol=1e-5)
        tails = [tuple(np.quantile(values, [1 - p, p])) for p in (0.999, 0.9999, 0.99999)]
        expected = least(values, tails, 2, spec.top)
        assert np.allclose(cut.flatten(1)[:, i], expected, rtol=1e-5)


def group_errors(x: torch.Tensor, q: Quantized) -> torch.Tensor:
    """Mean of the errors' powers, group by group."""
    errors, _ = grouped((q.dequantize() - x).abs().pow(2.4), q.spec)
    return errors.mean(-1)


@settings(max_examples=60)
@given(
    st.integers(2, 8),
    st.sampled_from(["minmax", "shrink", "shrink-far", "percentile"]),
    st.sampled_from([-9.0, 0.0, 0.5, 9.0]),
    st.integers(0, 2 ** 32 - 1),
)
def test_zero_points_are_codes_and_errors_no_worse_than_before(bits, choice, offset, seed):
    spec = QuantSpec(bits, "group", 16)
    x = spread(8, 32, seed=seed) + offset
    x[3] = 0
    x[4] = 0.7
    q = quantize_range(x, spec, choice)
    assert torch.equal(q.zero, q.zero.round())
    assert q.zero.min() >= 0 and q.zero.max() <= spec.top
    assert (q.scale > 0).all() and (q.scale[3] == 1).all()
    assert int(q.codes.max()) <= spec.top
    assert torch.equal(q.dequantize()[3], x[3])
    # A constant group needs no narrower range.
    assert torch.allclose(q.dequantize()[4], x[4], rtol=1e-5)
    if choice.startswith("shrink"):
        errors = group_errors(x, q)
        whole = group_errors(x, quantize(x, spec))
        assert (errors <= whole * (1 + 1e-5) + 1e-12).all()


def test_the_widest_of_equally_good_ranges_is_kept():
    # Errors so small that their powers are 0.
    x, spec = 1e-25 * spread(8, 32), QuantSpec(4, "channel")
    assert torch.equal(quantize_range(x, spec, "shrink").scale, quantize(x, spec).scale)


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 6144])
def test_percentiles_are_those_of_torch(count):
    sample, spec = spread(count), QuantSpec(8, "tensor")
    tails = []
    for p in (0.999, 0.9999, 0.99999):
        low = torch.quantile(sample, 1 - p).clamp(max=0)
        high = torch.quantile(sample, p).clamp(min=0)
        tails.append((float(low), float(high)))
    scale, zero = tensor_range(sample, spec, "percentile")
    expected_scale, expected_zero = least(sample.double().numpy(), tails, 2, spec.top)
    assert abs(float(scale) / expected_scale - 1) < 1e-6
    assert float(zero) == expected_zero


def test_samples_of_more_values_than_torch_quantile_takes():
    sample = torch.arange(2 ** 24 + 6, dtype=torch.int32).float() / 2 ** 24  # 0 to 1
    scale, zero = tensor_range(sample, QuantSpec(8, "tensor"), "percentile")
    assert zero == 0 and abs(scale * 255 - 1) < 2e-3


@pytest.mark.parametrize("zero", [0, 77, 255])
def test_static_codes_are_clamped_at_both_ends_as_in_pytorch(zero):
    x = 3 * spread(5, 40, 8)
    scale, spec = torch.tensor(0.02), QuantSpec(8, "tensor")
    codes = static_codes(x, scale, torch.tensor(float(zero)), spec)
    assert codes.min() == -zero and codes.max() == 255 - zero
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.02, zero, 0, 255)
    assert torch.allclose(codes * scale, theirs, atol=1e-6)
    nan = torch.tensor([float("nan")])
    assert torch.isnan(static_codes(nan, scale, torch.tensor(0.0), spec)).all()


def error_sum(values: np.ndarray, scale: float, zero: float, top: int) -> float:
    """Sum the errors of one range as PTQ4DM's code does, in double precision."""
    codes = np.clip(np.round(values / scale) + zero, 0, top)
    return float((np.abs((codes - zero) * scale - values) ** 2.4).sum())


def searched_by_hand(values: np.ndarray, top: int) -> tuple[float, float, float]:
    """Try every range of PTQ4DM's search; error, scale and zero point of the first best.

    Values of one sign have their bound searched, all others the width and every zero point.
    """
    low, high = values.min(), values.max()
    if low >= 0:
        zeros, width = [0], high
    elif high <= 0:
        zeros, width = [top], -low
    else:
        zeros, width = range(top + 1), high - low
    tried = []
    for i in range(1, 101):
        scale = width / 100 * i / top
        tried += [(error_sum(values, scale, zero, top), scale, zero) for zero in zeros]
    return min(tried)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("offset", [0.0, 1.5, 90.0, -90.0])
@pytest.mark.parametrize("outliers", [1, 30])
def test_the_search_finds_what_trying_every_range_finds(bits, offset, outliers):
    rng = np.random.default_rng(bits)
    values = rng.normal(size=70)
    values[:3] *= outliers
    sample = torch.tensor(values + offset, dtype=torch.float32).reshape(7, 10)
    scale, zero = tensor_range(sample, QuantSpec(bits, "tensor"), "search")
    assert scale.dim() == zero.dim() == 0
    assert scale.dtype == zero.dtype == torch.float32
    values, top = sample.flatten().double().numpy(), 2 ** bits - 1
    error, expected_scale, expected_zero = searched_by_hand(values, top)
    assert float(scale) == pytest.approx(expected_scale, rel=1e-6)
    assert float(zero) == expected_zero
    assert error_sum(values, expected_scale, expected_zero, top) == error


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_the_search_scales_with_the_values(size):
    values = spread(1, 60).flatten()
    scale, zero = tensor_range(values, QuantSpec(4, "tensor"), "search")
    scaled, same_zero = tensor_range(size * values, QuantSpec(4, "tensor"), "search")
    assert float(scaled) == pytest.approx(size * float(scale), rel=1e-5)
    assert zero == same_zero


def test_the_search_leaves_zeros_alone():
    scale, zero = tensor_range(torch.zeros(5), QuantSpec(8, "tensor"), "search")
    assert (scale, zero) == (1, 0)


@pytest.mark.parametrize("choice", ["minmax", "shrink-far", "percentile", "search"])
def test_every_step_has_the_range_of_its_own_samples(choice):
    samples, spec = spread(4, 3, 20), QuantSpec(4, "tensor")
    samples[2] = samples[2].abs()
    scales, zeros = step_ranges(samples, spec, choice)
    assert scales.shape == zeros.shape == (4,)
    for sample, scale, zero in zip(samples, scales, zeros):
        expected_scale, expected_zero = tensor_range(sample, spec, choice)
        assert float(scale) == pytest.approx(float(expected_scale), rel=1e-6)
        assert zero == expected_zero


@pytest.mark.parametrize("choice", ["minmax", "shrink", "percentile"])
def test_what_is_not_finite_or_not_known_is_refused(choice):
    x = spread(8, 8)
    x[3, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_range(x, QuantSpec(4, "channel"), choice)
    with pytest.raises(ValueError, match="NaN or infinity"):
        tensor_range(x, QuantSpec(8, "tensor"), choice)
    with pytest.raises(ValueError, match="NaN or infinity"):
        tensor_range(x, QuantSpec(8, "tensor"), "search")
    with pytest.raises(ValueError, match="expected one of"):
        quantize_range(spread(8, 8), QuantSpec(4, "channel"), choice + "s")
