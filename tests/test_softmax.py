"""The log-sqrt2 quantiser of probabilities: nearest powers, its ends, the choice of its scale."""
import numpy as np
import pytest
import torch

from quant.activations.softmax import fake_quantize_log_sqrt2, fit_powers


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_probability_becomes_the_nearest_power_of_root_two(bits, scale):
    rng = np.random.default_rng(bits)
    probabilities = rng.dirichlet(np.full(64, 0.1), 20).ravel()
    powers = 2.0 ** rng.uniform(-2 ** (bits - 1) - 2, 0, 2000)
    p = np.concatenate([probabilities, powers]).astype(np.float32)
    p = p[p > 1e-37]  # what CPUs may flush to 0
    out = fake_quantize_log_sqrt2(torch.tensor(p), bits, torch.tensor(scale)).numpy()
    # The last code stands for all that becomes 0.
    codes = np.arange(2 ** bits + 1)
    values = np.append(scale * 2.0 ** (-codes[:-1] / 2), 0.0)
    distance = np.abs(np.log2(p.astype(np.float64) / scale)[:, None] + codes / 2)  # (n, codes)
    first, second = np.partition(distance, 1, axis=1)[:, :2].T
    sure = second - first > 1e-5
    expected = values[distance.argmin(1)]
    assert sure.mean() > 0.99
    assert np.allclose(out[sure], expected[sure], rtol=1e-6, atol=0)
    assert (out == 0).any() == (expected == 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ends(dtype):
    p = torch.tensor([0.0, 1.0, 0.5, 2.0 ** -7.5, 2.0 ** -8, 1.5, float("nan")], dtype=dtype)
    out = fake_quantize_log_sqrt2(p, 4, torch.tensor(1.0))
    assert out.dtype == dtype
    assert out[:3].tolist() == [0.0, 1.0, 0.5]
    assert out[3] == p[3]
    assert out[4] == 0 and out[5] == 1
    assert torch.isnan(out[6])


def test_powers_of_root_two_stay():
    p = torch.exp2(-torch.arange(16) / 2)
    assert torch.allclose(fake_quantize_log_sqrt2(p, 4, torch.tensor(1.0)), p, rtol=1e-6)


def test_the_scale_is_the_largest_or_the_best_of_three_percentiles():
    rng = np.random.default_rng(0)
    p = torch.tensor(rng.dirichlet(np.full(16, 0.3), 4000), dtype=torch.float32)
    assert fit_powers(p, 4, "minmax").scale == p.max()
    cuts = np.quantile(p.double().numpy(), [0.999, 0.9999, 0.99999])
    errors = []
    for cut in cuts:
        values = fake_quantize_log_sqrt2(p, 4, torch.tensor(float(cut)))
        errors.append(float((values - p).square().mean()))
    powers = fit_powers(p, 4, "percentile")
    assert np.isclose(powers.scale, cuts[np.argmin(errors)], rtol=1e-5)
    assert powers.bits == 4 and powers.scale.dim() == 0
