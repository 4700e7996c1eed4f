
"""GPTQ: against its definition, published values, and plain rounding on the outlier twin."""
from functools import partial

import numpy as np
import pytest
import torch
from conftest import block_linears, golden, relative

from architectures.registry import architecture_of
from cards import DiT_models
from diffusion import ImageNoise, make_schedule
from diffusion.generate import guided_drive
from download import load_model
from quant.calibration.observers import SecondMoment
from quant.calibration.trajectory import record, replay
from quant.calibration.watch import Watch
from quant.numerics.cholesky import damped_cholesky
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import quantize
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
    # numpy's is lower: inverse = L L^T, and U = L^T.
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T
    factor = inverse_factor(torch.tensor(hessian), 0.01).numpy()
    assert np.allclose(np.triu(factor), factor)
    assert np.allclose(factor.T @ factor, np.linalg.inv(damped))
    assert np.allclose(np.abs(factor), np.abs(expected))


@pytest.mark.parametrize("negative, times", [(0, 1), (0.5, 1), (2, 10), (50, 100)])
def test_a_second_moment_that_rounding_made_indefinite_is_damped_more(negative, times):
    damping = torch.tensor(1e-4, dtype=torch.double)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.double))[0]
    eigenvalues = torch.linspace(0, 12, 12, dtype=torch.double)
    eigenvalues[0] = -negative * damping
    moment = rotation @ eigenvalues.diag() @ rotation.T
    factor = damped_cholesky(moment, damping)
    assert torch.equal(factor, factor.tril())
    expected = moment + times * damping * torch.eye(12, dtype=torch.double)
    assert torch.allclose(factor @ factor.T, expected, rtol=0, atol=1e-10)


def test_a_second_moment_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="expected finite inputs"):
        damped_cholesky(torch.full((3, 3), float("nan")), torch.tensor(0.01))


def test_each_column_is_rounded_as_optimal_brain_quantisation_says():
    """The definition: round a column, solve least squares of all that are left for the rest."""
    rng = np.random.default_rng(1)
    weight = torch.tensor(rng.normal(size=(3, 8)), dtype=torch.float32)
    x = rng.normal(size=(40, 8)) @ rng.normal(size=(8, 8))
    hessian = x.T @ x + 0.01 * np.mean(np.diag(x.T @ x)) * np.eye(8)
    spec = QuantSpec(3, "channel")
    plain = quantize(weight, spec)
    scale, zero = plain.scale.numpy(), plain.zero.numpy()
    left, expected = weight.double().numpy().copy(), np.zeros((3, 8))
    for i in range(8):
        column = left[:, i:i + 1]
        codes = np.clip(np.round(column / scale) + zero, 0, spec.top)
        expected[:, i:i + 1] = (codes - zero) * scale
        error = column - expected[:, i:i + 1]
        if i < 7:
            share = np.linalg.solve(hessian[i + 1:, i + 1:], hessian[i + 1:, i])
            left[:, i + 1:] += error @ share.reshape(1, -1)
    quantizer = gptq_quantizer(spec, torch.tensor(x.T @ x, dtype=torch.float32))
    assert np.allclose(quantizer(weight).dequantize(), expected, atol=1e-5)


@pytest.mark.parametrize("spec", [
    QuantSpec(4, "channel"),
    QuantSpec(3, "group", 32),
    QuantSpec(4, "group", 24, "two-level"),
    QuantSpec(4, "group", 192),
])
def test_codes_are_in_range_and_blocks_change_nothing_else(spec):
    torch.manual_seed(0)
    weight, x = torch.randn(16, 192), torch.randn(400, 192) @ torch.randn(192, 192)
    x[:, 5] = 0  # an input that is always zero
    result = gptq_quantizer(spec, x.T @ x)(weight)
    assert result.codes.max() <= spec.top and result.codes.shape == weight.shape
    nearest = quantize_weight(weight, spec)
    assert output_error(x, weight, result) < 0.8 * output_error(x, weight, nearest)
    if spec.convention == "two-level":
        integers, _ = result.integers()
        assert integers.abs().max() <= 127
        assert torch.equal(result.scale, result.scale.round())
    if spec.granularity == "channel":
        other = gptq_quantizer(spec, x.T @ x, block=7)(weight)
        assert torch.equal(other.codes, result.codes)


def output_error(x, weight, quantized):
    """Norm of what quantisation changes in the outputs for inputs ``x``."""
    return (x @ (quantized.dequantize() - weight).T).norm()


@pytest.mark.parametrize("convention", ["affine", "free"])
def test_uncorrelated_inputs_leave_rounding_to_the_nearest(convention):
    """Also in groups of which the last is short, across blocks of other lengths."""
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(4, "group", 48, convention, tail=True)
    out = gptq_quantizer(spec, torch.eye(100), block=32)(weight)
    expected = quantize(weight, spec)
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(out.dequantize(), expected.dequantize())


def test_a_weight_that_is_not_finite_is_refused():
    weight = torch.ones(4, 8)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        gptq_quantizer(QuantSpec(4, "channel"), torch.eye(8))(weight)


@pytest.fixture(scope="module")
def twin():
    """The outlier twin with second moments of its inputs on one trajectory, and on another one."""
    with torch.no_grad():
        name = "DiT-Digits-Outliers"
        model = load_model(name, DiT_models[name], 16, 10, None, torch.device("cpu"))
        linears, schedule, moments = block_linears(model), make_schedule("10"), []
        for seed in (0, 7):
            noise = ImageNoise(seed, range(16), (4, 8, 8))
            labels = torch.arange(16) % 10
            drive = guided_drive(schedule, noise(), noise, labels, 1.5)
            sites = architecture_of(model).sites(model, "blocks")
            trajectory, _ = record(model, sites, drive)
            watch = Watch()
            observers = {
                name: watch.add(name, SecondMoment, partial(SecondMoment, 10))
                for name in linears}
            replay(model, trajectory, watch, 4096, "moments")
            moments.append({name: observer.value for name, observer in observers.items()})
        return linears, moments


@pytest.mark.parametrize("spec", [QuantSpec(4, "channel"), QuantSpec(4, "group", 32)])
def test_gptq_beats_rounding_on_the_outlier_twin(twin, spec):
    linears, (calibration, held_out) = twin
    on_calibration, on_held_out = [], []
    for name, linear in linears.items():
        weight = linear.weight
        gptq = gptq_quantizer(spec, calibration[name])(weight)
        nearest = quantize(weight, spec)
        for moment, ratios in (
            (calibration[name], on_calibration),
            (held_out[name], on_held_out),
        ):
            ratio = squared_error(weight, gptq, moment) / squared_error(weight, nearest, moment)
            ratios.append(float(ratio))
    assert max(on_calibration) < 1
    assert np.mean(np.array(on_held_out) < 1) >= 0.95
    print(
        "GPTQ over nearest, squared output error: "
        f"calibration {np.mean(on_calibration):.2f}, held out {np.mean(on_held_out):.2f}"
    )


def squared_error(weight, quantized, moment):
    """Squared error of the outputs for inputs of a second moment (I, I)."""
    difference = quantized.dequantize() - weight
    return (difference.double() @ moment.double() * difference).sum()


def test_second_moment_is_that_of_the_inputs():
    linear, x = torch.nn.Linear(6, 4), torch.randn(4, 3, 5, 6)
    observer = SecondMoment(8)
    for part in x.split(3):
        observer(part, linear(part))
    assert relative(observer.value * 8, np.einsum("knti,kntj->ij", *[x.numpy()] * 2)) < 1e-5
