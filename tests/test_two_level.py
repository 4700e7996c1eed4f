"""Integer group scales: the best of those tried, compiled or not."""
import itertools

import pytest
import torch

from quant.numerics.spec import QuantSpec
from quant.weights.two_level import fused_least_errors, least_errors


def errors_by_scale(weight, step, cost, spec: QuantSpec) -> dict[int, float]:
    """Weighted squared error of one group for each integer scale that is tried, by definition.

    Args:
        weight: (g,) float64; step: () float64; cost: (g,).
    """
    low, high = weight.amin().clamp(max=0), weight.amax().clamp(min=0)
    spanning = int((high - low) / (step * spec.top))
    errors = {}
    for offset in (-1, 0, 1, 2):
        k = min(max(spanning + offset, 1), 127)
        zero = min(round(float(-low / (k * step))), spec.top)
        values = [k * v for v in range(-zero, spec.top - zero + 1) if k * abs(v) <= 127]
        differences = weight[:, None] - step * torch.tensor(values, dtype=torch.float64)
        nearest = differences.square().amin(1)
        errors[k] = float((nearest * cost).sum())
    return errors


@pytest.mark.parametrize("search", [least_errors, fused_least_errors])
@pytest.mark.parametrize("bits, rows, size", [(2, 3, 8), (4, 5, 24), (8, 2, 16)])
def test_integer_group_scales_are_the_best_of_those_tried(search, bits, rows, size):
    torch.manual_seed(bits)
    groups, cost = torch.randn(rows, 3, size), torch.rand(3, size)
    spec = QuantSpec(bits, "group", size, "two-level")
    groups[0, 0] = 0.0
    groups[0, 1] = groups[0, 1].abs()
    groups[1, 2] = -groups[1, 2].abs()
    steps = groups.abs().amax((1, 2)) * torch.tensor([0.9, 1.1, 1.3])[:, None] / 127
    scales, errors = search(groups, steps, cost, spec)
    for f, o, g in itertools.product(range(3), range(rows), range(3)):
        tried = errors_by_scale(groups[o, g].double(), steps[f, o].double(), cost[g], spec)
        least = pytest.approx(min(tried.values()), rel=1e-4, abs=1e-12)
        assert float(errors[f, o, g]) == least
        assert tried[int(scales[f, o, g])] == least


@pytest.mark.parametrize("rows, columns, size", [(8, 64, 16), (5, 96, 96), (384, 128, 64)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compiled_group_scales_are_those_of_the_definition(rows, columns, size, bits):
    torch.manual_seed(bits)
    groups, cost = torch.randn(rows, columns // size, size), torch.rand(columns // size, size)
    spec = QuantSpec(bits, "group", size, "two-level")
    steps = (torch.rand(4, rows) * 0.5 + 0.1) / spec.top
    scales, errors = fused_least_errors(groups, steps, cost, spec)
    expected_scales, expected_errors = least_errors(groups, steps, cost, spec)
    assert torch.allclose(errors, expected_errors, rtol=1e-5)
    # They differ where two scales do equally well.
    assert (scales != expected_scales).float().mean() < 0.01
    assert expected_scales.unique().numel() > 2
