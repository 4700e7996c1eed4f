"""The grid search against the paper's loss, one product per candidate and timestep."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import noise_drive, random_model
from torch import nn

from config import RECIPES
from quant.balancing.candidates import rounded
from quant.balancing.compiled import FUSED, fused_rounded
from quant.balancing.losses import DEFINITION
from quant.balancing.maxima import aggregate, check_step, searched_steps, smoothing_factors
from quant.balancing.search import AlphaSearch
from quant.calibration.trajectory import Drive
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import fake_quantize
from quant.pipeline import quantize_model
from quant.recipe import BitWidths, weight_spec
from quant.weights.low_rank import lowrank_quantize
from quant.weights.rounding import nearest_quantizer
from quant.weights.two_level import round_to_int8

ROOT = Path(__file__).parents[1]


def brute_force(weight, factors, weight_spec, act, shared, x):
    """The loss as the paper defines it: one product per candidate and timestep, in float64."""
    losses = []
    for s in factors:
        if shared is not None:
            quantised = shared * s
        elif weight_spec.convention == "two-level":
            values, step = round_to_int8(weight * s, weight_spec)
            quantised = values * step[:, None]
        else:
            quantised = fake_quantize(weight * s, weight_spec)
        total = 0.0
        for inputs in x:
            got = F.linear(fake_quantize(inputs / s, act).double(), quantised.double())
            expected = F.linear(inputs.double(), weight.double())
            total += (got - expected).square().mean().item()
        losses.append(total)
    return torch.tensor(losses, dtype=torch.float64)


def layout_spec(layout, bits):
    if layout == "two-level":
        return QuantSpec(bits, "group", 64, "two-level")
    return QuantSpec(bits, layout, 32 if layout == "strided" else 64)


@pytest.mark.parametrize("shape", [(256, 64), (192, 64), (64, 64), (64, 256)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("act_layout", [
    ("token", "affine"),
    ("image", "affine"),
    ("tensor", "published"),
])
@pytest.mark.parametrize("layout, weight_bits, act_bits, arithmetic", [
    ("group", 4, 8, DEFINITION),
    ("group", 8, 8, DEFINITION),
    ("group", 8, 16, DEFINITION),
    ("two-level", 4, 8, DEFINITION),
    ("group", 4, 8, FUSED),
    ("group", 8, 8, FUSED),
    ("two-level", 4, 8, FUSED),
    ("two-level", 8, 6, FUSED),
    ("channel", 4, 8, FUSED),
    ("channel", 8, 8, FUSED),
    ("strided", 4, 8, FUSED),
])
def test_streamed_losses_are_the_papers(
        shape, shared, act_layout, layout, weight_bits, act_bits, arithmetic):
    rows, columns = shape
    granularity, convention = act_layout
    torch.manual_seed(rows + columns)
    weight_spec = layout_spec(layout, weight_bits)
    act = QuantSpec(act_bits, granularity, convention=convention)
    weight = torch.randn(rows, columns)
    x = torch.randn(5, 3, 7, columns)
    x[..., ::16] *= 40  # outlier channels
    a = x.abs().amax((0, 1, 2))
    alphas = (0.0, 0.5, 0.85, 1.0)
    factors = torch.stack([smoothing_factors(a, weight, alpha, 1e-4) for alpha in alphas])
    base = fake_quantize(weight, weight_spec) if shared else None
    bias = torch.randn(rows)
    search = AlphaSearch(weight, bias, factors, weight_spec, act, base, arithmetic)
    for chunk in (x[:3], x[3:]):
        search(chunk, F.linear(chunk, weight, bias))
    expected = brute_force(weight, factors, weight_spec, act, base, x)
    assert torch.allclose(search.loss, expected, rtol=2e-5)
    # With nothing to smooth, all candidates are alike.
    assert expected[search.loss.argmin()] <= expected.min() * (1 + 2e-5)


@pytest.mark.parametrize("rows, columns, group", [(8, 64, 16), (5, 96, 96), (16, 24, 64)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_int8_values_are_the_rounded_weight_to_half_a_step(rows, columns, group, bits):
    torch.manual_seed(bits)
    weight = torch.randn(rows, columns) * torch.logspace(-3, 1, rows)[:, None]
    weight[0] = 0.0
    weight[1, :min(group, columns // 2)] = 0.0
    spec = QuantSpec(bits, "group", group, "two-level")
    values, step = round_to_int8(weight, spec)
    assert values.dtype == torch.int8 and values.min() >= -127 and not values[0].any()
    error = values * step[:, None] - fake_quantize(weight, spec)
    assert (error.abs() <= 0.501 * step[:, None]).all()
    # No larger than they have to be.
    assert (step[1:] <= 2.1 * weight[1:].abs().amax(1) / 127).all()


@pytest.mark.parametrize("rows, columns, group", [
    (8, 64, 16),
    (5, 96, 96),
    (33, 24, 64),
    (512, 128, 64),
])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compiled_candidates_are_those_of_the_definition(rows, columns, group, bits):
    torch.manual_seed(bits)
    weight = torch.randn(rows, columns) * torch.logspace(-3, 1, rows)[:, None]
    factors = torch.rand(5, columns) * 3
    weight[0] = 0.0
    weight[1, :min(group, columns // 2)] = 0.0
    weight[2] = weight[2].abs()
    spec = QuantSpec(bits, "group", group, "two-level")
    ours = fused_rounded(weight, factors, spec)
    expected = rounded(weight, factors, spec)
    assert expected.values.unique().numel() >= min(2 ** bits, 200)
    assert torch.equal(ours.values, expected.values)
    assert torch.equal(ours.step, expected.step)
    assert torch.equal(ours.sums, expected.sums)


def test_compiled_kernels_leave_the_number_of_threads_as_it_was():
    code = """import torch
from quant.balancing.compiled import fused_rounded
from quant.numerics.uniform import QuantSpec
before = torch.get_num_threads()
fused_rounded(torch.ones(8, 64), torch.ones(2, 64), QuantSpec(4, "group", 64, "two-level"))
print(before, torch.get_num_threads())"""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    environment = os.environ | threads
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "1"], done.stderr


def test_the_first_of_equal_candidates_wins():
    weight, x = torch.randn(8, 8), torch.randn(1, 2, 3, 8)
    search = AlphaSearch(
        weight, None, torch.ones(4, 8), QuantSpec(4, "channel"), QuantSpec(8, "token"), None)
    search(x, F.linear(x, weight))
    assert search.loss.argmin() == 0


def test_factors_are_the_closed_form():
    a = torch.tensor([4.0, 0.0, 100.0])
    w = torch.tensor([[1.0, -2.0, 0.0], [-0.25, 0.5, 0.0]])
    s = smoothing_factors(a, w, 0.5, 1e-4)
    expected = torch.tensor([(4.0 / 1.0) ** 0.5, (1e-4 / 2.0) ** 0.5, (100.0 / 1e-4) ** 0.5])
    assert torch.allclose(s, expected)
    assert torch.allclose(smoothing_factors(a, w, 1.0, 1e-4), torch.tensor([4.0, 1e-4, 100.0]))
    assert torch.allclose(smoothing_factors(a, w, 0.0, 1e-4), torch.tensor([1.0, 0.5, 1e4]))


@pytest.mark.parametrize("choice, expected", [("published", (10, 50, 50)), ("all", (10, 50, 100))])
def test_the_published_search_looks_at_no_more_than_50_steps(choice, expected):
    assert tuple(searched_steps(choice, steps) for steps in (10, 50, 100)) == expected


def linear_inputs(model: nn.Module, name: str, drive: Drive) -> torch.Tensor:
    """Sample once, and keep a linear's input in every step, (steps, 2N, T, I)."""
    inputs = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: inputs.append(args[0]))
    drive(model)
    handle.remove()
    return torch.stack(inputs)


@pytest.mark.parametrize("choice, steps", [("published", 50), ("all", 53)])
def test_losses_are_those_of_the_noisiest_steps_and_maxima_those_of_all(choice, steps):
    model, name, alphas = random_model(depth=1), "blocks.0.mlp.fc1", (0.0, 0.5, 1.0)
    recipe = replace(RECIPES["ditas-published"], rank=4, search_steps=choice, alphas=alphas)
    result = quantize_model(
        model, recipe, BitWidths(4, 8), noise_drive(53, torch.arange(2)), svd="exact")

    x = linear_inputs(model, name, noise_drive(53, torch.arange(2)))
    weight, spec = model.get_submodule(name).weight, weight_spec(recipe, 4)
    base = lowrank_quantize(weight, nearest_quantizer(spec), 4, recipe.rounds, "last", "exact")
    largest = x.abs().amax((0, 1, 2))
    factors = torch.stack([
        smoothing_factors(largest, base.base.dequantize(), alpha, 1e-4) for alpha in alphas])
    act = QuantSpec(8, "tensor", convention="published")
    expected = brute_force(weight, factors, spec, act, base.dense(), x[:steps])
    assert torch.allclose(result.losses[name], expected, rtol=2e-5)


def test_tas_takes_all_steps_and_smoothquant_one():
    absmax = torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 4.0]])
    assert aggregate(absmax, "tas", 0).tolist() == [3.0, 5.0]
    assert aggregate(absmax, "smoothquant", 1).tolist() == [3.0, 2.0]
    check_step(2, 3)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        check_step(3, 3)
