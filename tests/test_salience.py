"""Salience balancing: published factors, rank correlations, and channels that never do anything."""
import numpy as np
import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from quant.balancing.salience import (
    complementary_shares,
    equal_shares,
    salience_factors,
    spearman,
)


def test_factors_match_golden():
    values = golden("baselines")
    act, weight, scale, balanced = [
        torch.tensor(values[f"ptq4dit_{key}"])
        for key in ("act", "weight", "scale", "balanced_weight")
    ]
    factors = salience_factors(act.abs().amax(1), weight, 1e-4, complementary_shares)
    assert torch.allclose(factors, scale, rtol=1e-6, atol=0)
    assert torch.allclose(weight * factors, balanced, rtol=1e-6, atol=0)


@settings(max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(3, 40),
    st.sampled_from([3, 1000]),
    st.integers(0, 2 ** 32 - 1),
)
def test_rank_correlation_is_scipys(rows, channels, levels, seed):
    rng = np.random.default_rng(seed)
    # Few levels mean many ties.
    a = rng.integers(0, levels, (rows, channels)) / 8
    b = rng.integers(0, levels, channels) / 8
    # No constant sides, for which scipy has NaN.
    a[:, 0] = levels
    b[0] = levels
    expected = [spearmanr(row, b).statistic for row in a]
    correlations = spearman(torch.tensor(a).float(), torch.tensor(b).float())
    assert np.allclose(correlations, expected, atol=1e-12, equal_nan=True)


def test_a_constant_row_correlates_with_nothing():
    correlations = spearman(torch.ones(2, 5), torch.arange(5.0))
    assert torch.equal(correlations, torch.zeros(2, dtype=torch.float64))


def test_rows_unlike_the_weight_count_more():
    w = torch.tensor([[1.0, -2.0, 4.0, 3.0]])
    act = torch.stack([w[0].abs(), 5 - w[0].abs()])  # rho of 1 and of -1
    share = np.exp([-1, 1]) / np.exp([-1, 1]).sum()
    expected = np.sqrt((share @ act.numpy()) / w[0].abs().numpy())
    assert np.allclose(salience_factors(act, w, 1e-4, complementary_shares), expected, rtol=1e-6)


def test_without_calibration_all_rows_count_alike():
    act, w = torch.rand(5, 24), torch.randn(40, 24)
    expected = np.sqrt(act.numpy().mean(0) / w.abs().numpy().max(0))
    assert np.allclose(salience_factors(act, w, 1e-9, equal_shares), expected, rtol=1e-5)


def test_both_sides_are_equally_salient_afterwards():
    act, w = torch.rand(1, 24) + 0.1, torch.randn(40, 24)
    s = salience_factors(act, w, 1e-4, complementary_shares)
    assert torch.allclose(act[0] / s, (w * s).abs().amax(0), rtol=1e-5)


@pytest.mark.parametrize("act, weight", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_dead_channels_keep_usable_factors(act, weight):
    s = salience_factors(
        torch.full((3, 4), act), torch.full((2, 4), weight), 1e-4, complementary_shares)
    assert torch.isfinite(s).all() and (s > 0).all()
    assert torch.allclose(s, torch.tensor(max(act, 1e-4) / max(weight, 1e-4)).sqrt())
