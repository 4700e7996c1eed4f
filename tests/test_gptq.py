
import numpy as np
import pytest
import torch
from conftest import golden, relative

from architectures.dit import block_linears
from diffusion import ImageNoise, make_schedule
from download import load_model
from models import DiT_models
from quant.calibration.observers import SecondMoment
from quant.calibration.trajectory import record, replay
from quant.numerics.uniform import QuantSpec, quantize
from quant.weights.gptq import inverse_factor
from quant.weights.rounding import gptq_quantizer, quantize_weight

GOLDEN = {key: torch.tensor(value) for key, value in golden("baselines").items()}


@pytest.mark.parametrize("group", ["channel", 16, 32])
def test_published_values(group):
    weight, x = GOLDEN["weight"], GOLDEN["act"]
    spec = QuantSpec(4, "channel") if group == "channel" else QuantSpec(4, "group", group)
    out = gptq_quantizer(spec, x.T @ x, block=32)(weight).dequantize()
    assert torch.allclose(out, GOLDEN[f"qdit_gptq_asym_w4_g{group}"], rtol=0, atol=1e-5)


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    x = np.random.default_rng(0).normal(size=(60, 20))
    hessian = x.T @ x
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(20)
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T  # numpy's is lower: inverse = L L^T, and U = L^T
    got = inverse_factor(torch.tensor(hessian), 0.01).numpy()
    assert np.allclose(np.triu(got), got) and np.allclose(got.T @ got, np.linalg.inv(damped))
    assert np.allclose(np.abs(got), np.abs(expected))


def test_each_column_is_rounded_as_optimal_brain_quantisation_says():
    """Against the definition: round a column, solve the least squares of all that are left for what makes up for it."""
    rng = np.random.default_rng(1)
    weight, x = torch.tensor(rng.normal(size=(3, 8)), dtype=torch.float32), rng.normal(size=(40, 8)) @ rng.normal(size=(8, 8))
    hessian = x.T @ x + 0.01 * np.mean(np.diag(x.T @ x)) * np.eye(8)
    spec = QuantSpec(3, "channel")
    plain = quantize(weight, spec)
    scale, zero = plain.scale.numpy(), plain.zero.numpy()
    left, expected = weight.double().numpy().copy(), np.zeros((3, 8))
    for i in range(8):
        expected[:, i:i + 1] = (np.clip(np.round(left[:, i:i + 1] / scale) + zero, 0, spec.top) - zero) * scale
        error = left[:, i:i + 1] - expected[:, i:i + 1]
        if i < 7:
            left[:, i + 1:] += error @ np.linalg.solve(hessian[i + 1:, i + 1:], hessian[i + 1:, i]).reshape(1, -1)
    got = gptq_quantizer(spec, torch.tensor(x.T @ x, dtype=torch.float32))(weight).dequantize()
    assert np.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("spec", [QuantSpec(4, "channel"), QuantSpec(3, "group", 32), QuantSpec(4, "group", 24, "two-level"), QuantSpec(4, "group", 192)])
def test_codes_are_in_range_and_blocks_change_nothing_else(spec):
    torch.manual_seed(0)
    weight, x = torch.randn(16, 192), torch.randn(400, 192) @ torch.randn(192, 192)
    x[:, 5] = 0  # an input that is always zero
    result = gptq_quantizer(spec, x.T @ x)(weight)
    assert result.codes.max() <= spec.top and result.codes.shape == weight.shape
    assert (x @ (result.dequantize() - weight).T).norm() < 0.8 * (x @ (quantize_weight(weight, spec).dequantize() - weight).T).norm()
    if spec.convention == "two-level":
        assert result.integers()[0].abs().max() <= 127 and torch.equal(result.scale, result.scale.round())
    if spec.granularity == "channel":
        assert torch.equal(gptq_quantizer(spec, x.T @ x, block=7)(weight).codes, result.codes)


def test_a_weight_that_is_not_finite_is_refused():
    weight = torch.ones(4, 8)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        gptq_quantizer(QuantSpec(4, "channel"), torch.eye(8))(weight)


@pytest.fixture(scope="module")
def twin():
    """The outlier twin with second moments of its inputs on one trajectory, and on another one."""
    with torch.no_grad():
        model = load_model("DiT-Digits-Outliers", DiT_models["DiT-Digits-Outliers"], 16, 10, None, torch.device("cpu"))
        linears, schedule, moments = block_linears(model), make_schedule("10"), []
        for seed in (0, 7):
            noise = ImageNoise(seed, range(16), (4, 8, 8))
            trajectory, _ = record(model, linears, schedule, torch.arange(16) % 10, 1.5, noise(), noise)
            observers = {name: SecondMoment(linear, 10) for name, linear in linears.items()}
            replay(model, linears, trajectory, {name: [each] for name, each in observers.items()}, 4096, "moments")
            moments.append({name: each.value for name, each in observers.items()})
        return linears, moments


@pytest.mark.parametrize("spec", [QuantSpec(4, "channel"), QuantSpec(4, "group", 32)])
def test_gptq_beats_rounding_on_the_outlier_twin(twin, spec):
    linears, (calibration, held_out) = twin
    ratios = {"calibration": [], "held out": []}
    for name, linear in linears.items():
        weight = linear.weight
        found = {"gptq": gptq_quantizer(spec, calibration[name])(weight), "nearest": quantize(weight, spec)}
        for key, moment in (("calibration", calibration[name]), ("held out", held_out[name])):
            errors = {kind: ((each.dequantize() - weight).double() @ moment.double() * (each.dequantize() - weight)).sum() for kind, each in found.items()}
            ratios[key].append(float(errors["gptq"] / errors["nearest"]))
    assert max(ratios["calibration"]) < 1
    assert np.mean(np.array(ratios["held out"]) < 1) >= 0.95
    print(f"GPTQ over nearest, squared output error: calibration {np.mean(ratios['calibration']):.2f}, held out {np.mean(ratios['held out']):.2f}")


def test_second_moment_is_that_of_the_inputs():
    linear, x = torch.nn.Linear(6, 4), torch.randn(4, 3, 5, 6)
    observer = SecondMoment(linear, 8)
    for part in x.split(3):
        observer(part, linear(part))
    assert relative(observer.value * 8, np.einsum("knti,kntj->ij", *[x.numpy()] * 2)) < 1e-5
