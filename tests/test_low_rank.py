"""The low-rank branch: its alternation with the quantiser, and its two solvers."""
import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import golden, golden_model, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from cards import DiT_models
from config import RECIPES, lowrank_rank
from download import find_state_dict
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import quantize
from quant.weights.low_rank import SOLVERS, exact_factors, lowrank_quantize
from quant.weights.rounding import nearest_quantizer

PUBLISHED = QuantSpec(4, "strided", 32, "published")
GROUPS = QuantSpec(4, "group", 64)

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def best_error(weight, spec, rank, solver):
    """Error of the branch as recipes have it: ten rounds, the best of which is kept."""
    result = lowrank_quantize(weight, nearest_quantizer(spec), rank, 10, "best", solver)
    return error(weight, result)


def error(weight, result):
    return (weight - result.dense()).norm().item()


def test_published_alternation_matches_golden():
    values, model = golden("ditas"), golden_model()
    for i in range(2):
        for name in BLOCK_LINEARS:
            key = f"blocks.{i}.{name}"
            weight = model.get_submodule(key).weight
            result = lowrank_quantize(weight, nearest_quantizer(PUBLISHED), 4, 10, "last", "exact")
            branch = values[f"{key}/lora_left"] @ values[f"{key}/lora_right"]
            expected = values[f"{key}/lora_quant_weight"] + branch
            assert relative(result.dense(), expected) < 1e-4, key


def test_exact_factors_are_the_truncated_svd_of_scipy():
    matrix = torch.randn(40, 60, dtype=torch.float64)
    u, s, vt = scipy.linalg.svd(matrix.numpy(), full_matrices=False)
    left, right, _ = exact_factors(matrix, 5, None)
    assert np.allclose(left @ right, (u[:, :5] * s[:5]) @ vt[:5])
    assert np.allclose(left.norm(dim=0), np.sqrt(s[:5]))
    assert np.allclose(right.norm(dim=1), np.sqrt(s[:5]))


@settings(max_examples=40)
@given(
    st.integers(2, 40),
    st.integers(2, 60),
    st.integers(1, 6),
    st.integers(0, 10 ** 6),
    st.sampled_from(sorted(SOLVERS)),
)
def test_the_low_rank_step_never_raises_the_error(rows, columns, rank, seed, solver):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, rows, columns)
    old = torch.randn(rows, columns, generator=generator)
    left, right, basis = SOLVERS[solver](old, rank, None)
    # What another rounding leaves over.
    new = old + 0.3 * torch.randn(rows, columns, generator=generator)
    before = (new - left @ right).norm()
    left, right, _ = SOLVERS[solver](new, rank, basis)
    assert (new - left @ right).norm() <= before * (1 + 1e-5)
    assert left.shape == (rows, rank) and right.shape == (rank, columns)


def test_the_best_round_is_kept_unless_told_otherwise():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    # So coarse that the error rises again after a few rounds.
    coarse = QuantSpec(2, "channel")
    errors = []
    for rounds in range(1, 11):
        last = lowrank_quantize(weight, nearest_quantizer(coarse), 4, rounds, "last", "exact")
        errors.append(error(weight, last))
    assert best_error(weight, coarse, 4, "exact") == pytest.approx(min(errors), rel=1e-6)
    # So that the two differ on this weight.
    assert errors[-1] > min(errors) * 1.005


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("spec", [GROUPS, PUBLISHED, QuantSpec(3, "channel")])
def test_alternation_beats_plain_rounding(spec, solver):
    weight = torch.randn(96, 128)
    plain = (weight - quantize(weight, spec).dequantize()).norm()
    assert best_error(weight, spec, 4, solver) < 0.99 * plain


def test_rank_zero_is_plain_rounding():
    weight = torch.randn(32, 64)
    result = lowrank_quantize(weight, nearest_quantizer(GROUPS), 0, 10, "best", "fast")
    assert torch.equal(result.dense(), quantize(weight, GROUPS).dequantize())


def test_rank_is_the_papers_share_of_the_width():
    ranks = [lowrank_rank(RECIPES["ditas"], width) for width in (1152, 128, 768, 16)]
    assert ranks == [32, 4, 21, 1]
    assert lowrank_rank(RECIPES["ditas-published"], 128) == 32


@pytest.mark.parametrize("model", ["DiT-Digits", "DiT-Digits-Outliers"])
def test_fast_solver_is_as_good_as_the_exact_one_on_every_digits_layer(model):
    _, state = find_state_dict(model, DiT_models[model], 16, None)
    for i in range(10):
        for name in BLOCK_LINEARS:
            weight = state[f"blocks.{i}.{name}.weight"]
            fast = best_error(weight, GROUPS, 4, "fast")
            exact = best_error(weight, GROUPS, 4, "exact")
            assert fast <= 1.001 * exact, (i, name, fast / exact - 1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1152, 1152), (1152, 4608), (4608, 1152)])
def test_fast_solver_is_as_good_as_the_exact_one_at_full_width(shape):
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    fast = best_error(weight, GROUPS, 32, "fast")
    exact = best_error(weight, GROUPS, 32, "exact")
    assert fast <= 1.001 * exact
