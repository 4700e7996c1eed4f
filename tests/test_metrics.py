"""The metrics against closed forms, scipy's general matrix root and loops written out."""
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation import metrics
from evaluation.metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    precision_recall,
    psnr_db,
    sqnr_db,
    statistics,
)


@pytest.fixture
def small_strips(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 7)


def gaussian(
    seed: int,
    count: int,
    width: int,
    scale: float = 1.0,
    shift: float = 0.0,
) -> np.ndarray:
    """Draw correlated features (count, width), float32."""
    rng = np.random.default_rng(seed)
    independent = scale * rng.normal(size=(count, width))
    mixing = rng.normal(size=(width, width))
    return (independent @ mixing + shift).astype(np.float32)


def grid_points(seed: int, count: int, width: int = 2, side: int = 12) -> np.ndarray:
    """Draw small integers: their distances are exact in float32, and often tie."""
    return np.random.default_rng(seed).integers(0, side, (count, width)).astype(np.float32)


def test_statistics_are_numpys_mean_and_covariance(small_strips):
    features = gaussian(0, 50, 6, shift=100.0)
    found = statistics(features)
    assert np.allclose(found.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    assert np.allclose(found.covariance, np.cov(features.T, dtype=np.float64), rtol=1e-9)


def test_fid_of_diagonal_normals_in_closed_form():
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(2, 9)), rng.uniform(0, 3, size=(2, 9))
    a = Statistics(means[0], np.diag(deviations[0] ** 2))
    b = Statistics(means[1], np.diag(deviations[1] ** 2))
    expected = np.square(means[0] - means[1]).sum()
    expected += np.square(deviations[0] - deviations[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_fid_of_shifted_normals_is_the_squared_shift():
    shift = np.array([3.0, 0, 0, -4, 0])
    a = statistics(gaussian(1, 40, 5))
    distances = [
        frechet_distance(a, Statistics(a.mean + size * shift, a.covariance))
        for size in (0, 0.1, 1, 2, 30)
    ]
    assert distances == pytest.approx([0, 0.25, 25, 100, 22500], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_fid_with_scipys_matrix_root(seed):
    a = gaussian(seed, 200, 20)
    b = gaussian(seed + 100, 300, 20, scale=1.5, shift=0.3)
    first = np.cov(a.T.astype(np.float64))
    second = np.cov(b.T.astype(np.float64))
    root = scipy.linalg.sqrtm(first @ second).real
    shift = np.square(a.mean(0, np.float64) - b.mean(0, np.float64)).sum()
    expected = shift + np.trace(first + second - 2 * root)
    distance = frechet_distance(statistics(a), statistics(b))
    assert distance == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(statistics(b), statistics(a)) == pytest.approx(distance, rel=1e-8)


@pytest.mark.parametrize("samples", [(20, 30), (20, 500)])
def test_fid_where_covariances_are_singular(samples):
    """With centred X, tr (C_a C_b)^(1/2) is a sum of singular values.

    They are those of X_a X_b^T over ((n - 1)(m - 1))^(1/2).
    """
    a = gaussian(5, samples[0], 64).astype(np.float64)
    b = gaussian(6, samples[1], 64).astype(np.float64)
    products = (a - a.mean(0)) @ (b - b.mean(0)).T
    singular_values = np.linalg.svd(products, compute_uv=False)
    overlap = singular_values.sum() / math.sqrt((len(a) - 1) * (len(b) - 1))
    variances = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + variances - 2 * overlap
    assert abs(frechet_distance(statistics(a), statistics(b)) - expected) < 1e-6 * variances


@pytest.mark.parametrize("count", [10, 400])
def test_fid_of_a_set_with_itself_is_zero(count):
    features = gaussian(7, count, 32)
    a = statistics(features)
    b = statistics(features[::-1])
    tolerance = 1e-6 * np.trace(a.covariance)
    assert 0 <= frechet_distance(a, a) <= tolerance
    assert 0 <= frechet_distance(a, b) <= tolerance


@pytest.mark.parametrize("features, message", [
    (np.array([[1.0, np.nan], [0, 0]]), "NaN or infinity"),
    (np.array([[1.0, np.inf], [0, 0]]), "NaN or infinity"),
    (np.ones((1, 4)), "at least 2 images, got 1"),
    (np.ones((0, 4)), "shape"),
    (np.ones(4), "shape"),
])
def test_statistics_refuse(features, message):
    with pytest.raises(ValueError, match=message):
        statistics(features)


def test_fid_refuses():
    two = Statistics(np.zeros(2), np.eye(2))
    three = Statistics(np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="width 2 and 3"):
        frechet_distance(two, three)
    with pytest.raises(ValueError, match="does not go with"):
        Statistics(np.zeros(2), np.eye(3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        Statistics(np.zeros(2), np.full((2, 2), np.inf))


def naive_inception_score(logits: np.ndarray, split: int) -> float:
    scores = []
    for start in range(0, len(logits), split):
        p = [softmax(row) for row in logits[start:start + split].tolist()]
        marginal = [sum(column) / len(p) for column in zip(*p)]
        divergences = [divergence(row, marginal) for row in p]
        scores.append(math.exp(sum(divergences) / len(p)))
    return sum(scores) / len(scores)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def divergence(row: list[float], marginal: list[float]) -> float:
    return sum(q * math.log(q / m) for q, m in zip(row, marginal))


@pytest.mark.parametrize("count, split", [(7, 3), (9, 3), (7, 100), (1, 5)])
def test_inception_score_written_out(count, split):
    logits = np.random.default_rng(count).normal(size=(count, 5)).astype(np.float32) * 3
    expected = naive_inception_score(logits, split)
    assert inception_score(logits, split) == pytest.approx(expected, rel=1e-9)


def test_inception_score_by_hand():
    assert inception_score(np.full((12, 6), 4.2, np.float32)) == pytest.approx(1)
    logits = np.tile(np.eye(6, dtype=np.float32) * 1000, (3, 1))
    assert inception_score(logits) == pytest.approx(6)
    assert inception_score(logits[:7], split=6) == pytest.approx((6 + 1) / 2)


def test_inception_score_of_logits_that_underflow():
    assert inception_score(np.array([[3e38, -3e38], [-3e38, 3e38]], np.float32)) == pytest.approx(2)
    with pytest.raises(ValueError, match="NaN or infinity"):
        inception_score(np.array([[np.inf, 0.0]]))


def count_covered(centres: list, points: list, distance) -> float:
    """Compute the share of points within the third-neighbour ball of at least one centre.

    One pair is looked at at a time.
    """
    radii = []
    for centre in centres:
        distances = sorted(distance(centre, other) for other in centres)
        radii.append(distances[3])
    covered = 0
    for point in points:
        covered += any(
            distance(centre, point) <= radius
            for centre, radius in zip(centres, radii)
        )
    return covered / len(points)


def covered_both_ways(real, samples, distance) -> tuple[float, float]:
    """Compute precision and recall, one pair at a time."""
    return count_covered(real, samples, distance), count_covered(samples, real, distance)


def exact_distance(a, b) -> float:
    return float(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist())))


def half_distance(a, b):
    """Compute a squared distance in numpy's float16: squares rounded one by one, sums exact."""
    a, b = a.astype(np.float16), b.astype(np.float16)
    squares = [np.float16((half * half).astype(np.float64).sum()) for half in (a, b)]
    product = np.float16(a.astype(np.float64) @ b.astype(np.float64))
    return max(squares[0] - np.float16(2) * product + squares[1], np.float16(0))


@pytest.mark.parametrize("seed, counts", [
    (0, (4, 4)), (1, (7, 14)), (2, (15, 6)), (3, (40, 33)), (4, (29, 50)),
])
def test_precision_and_recall_pair_by_pair(small_strips, seed, counts):
    real = grid_points(seed, counts[0])
    samples = grid_points(seed + 50, counts[1]) + 3
    expected = covered_both_ways(real, samples, exact_distance)
    assert precision_recall(real, samples) == pytest.approx(expected)
    assert precision_recall(samples, real) == pytest.approx(expected[::-1])


def test_precision_and_recall_of_equal_and_of_distant_sets():
    features = gaussian(0, 60, 8)
    assert precision_recall(features, features[::-1].copy()) == (1, 1)
    assert precision_recall(features, features + 1000) == (0, 0)


def test_collapsed_samples_are_precise_and_recall_nothing():
    real = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=(100, 8)).astype(np.float32)
    collapsed = real[:1] + 0.01 * noise
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1 and recall <= 1 / 200
    assert precision_recall(collapsed, real) == (recall, precision)


def test_the_surface_belongs_to_the_ball():
    far = np.array([[900, 0], [900, 1], [900, 2]], np.float32)
    # The first one's ball has radius 3.
    real = np.array([[0, 0], [3, 0], [-3, 0], [0, 3]], np.float32)
    assert precision_recall(real, np.vstack([far, [[0, -3]]]))[0] == 0.25
    # Each ball has radius 2 ** 0.5.
    alone = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)
    assert precision_recall(alone, np.vstack([far, [[2, 2]]]))[0] == 0.25
    assert precision_recall(alone, np.vstack([far, [[2, 2.001]]]))[0] == 0


@pytest.mark.parametrize("seed", range(3))
def test_float16_distances_round_as_numpys(small_strips, seed):
    real = grid_points(seed, 30, width=3, side=25) / 4 + 30
    samples = grid_points(seed + 50, 26, width=3, side=25) / 4 + 30 + 2
    rounded = covered_both_ways(real, samples, half_distance)
    assert precision_recall(real, samples, half=True) == pytest.approx(rounded)
    assert precision_recall(real, samples) != pytest.approx(rounded)


def test_float16_gives_way_to_float32_where_it_overflows():
    real = grid_points(8, 30) + 1000
    samples = grid_points(9, 30) + 1003
    expected = covered_both_ways(real, samples, exact_distance)
    assert 0 < expected[0] < 1
    assert precision_recall(real, samples, half=True) == pytest.approx(expected)


def blockwise_distance(a: np.ndarray, b: np.ndarray, block: int):
    """Make the distance of row i of ``a`` to row j of ``b`` that ADM's evaluator computes.

    It is that of float16, unless one overflows in the block x block pairs around it.
    """
    half = np.array([[half_distance(x, y) for y in b] for x in a], np.float64)
    exact = np.array([[exact_distance(x, y) for y in b] for x in a])
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            place = slice(i, i + block), slice(j, j + block)
            if not np.isfinite(half[place]).all():
                half[place] = exact[place]
    return half


def blockwise_precision_recall(real: np.ndarray, made: np.ndarray, block: int):
    """Compute precision and recall from all pairs of distances at once."""
    real_radii, made_radii = (
        np.sort(blockwise_distance(x, x, block), axis=1)[:, 3] for x in (real, made))
    between = blockwise_distance(real, made, block)
    precision = (between <= real_radii[:, None]).any(0).mean()
    recall = (between <= made_radii).any(1).mean()
    return precision, recall


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("seed", range(4))
def test_float16_gives_way_in_blocks_of_the_published_size(monkeypatch, seed):
    monkeypatch.setattr(metrics, "ROWS", 3)
    monkeypatch.setattr(metrics, "BLOCK", 10)
    real = grid_points(seed, 34, width=3, side=25) / 4 + 30
    made = grid_points(seed + 50, 28, width=3, side=25) / 4 + 30 + 2
    # Their squared norms overflow: in the second block of rows, and in the last of the columns.
    real[14] = 200
    made[25] = 200
    found = precision_recall(real, made, half=True)
    assert found == pytest.approx(blockwise_precision_recall(real, made, 10))
    # Strips of three rows, or everything at once, come to other numbers.
    for block in (3, 100):
        assert found != pytest.approx(blockwise_precision_recall(real, made, block))


def test_the_published_blocks_are_of_10_000():
    assert metrics.BLOCK == 10_000


def test_precision_and_recall_refuse():
    fine = gaussian(0, 10, 4)
    for bad, message in (
        (fine[:3], "at least 4 images, got 3"),
        (fine[:, :3], "width"),
        (fine * np.nan, "NaN"),
        (fine * np.inf, "NaN"),
        (fine.ravel(), "shape"),
    ):
        for pair in ((fine, bad), (bad, fine)):
            with pytest.raises(ValueError, match=message):
                precision_recall(*pair)


def test_psnr_in_closed_form():
    shape = (2, 3, 5, 3)
    black = np.full(shape, 0, np.uint8)
    grey = np.full(shape, 51, np.uint8)
    white = np.full(shape, 255, np.uint8)
    assert psnr_db(black, grey) == pytest.approx([20 * math.log10(5)] * 2)
    assert psnr_db(grey, black) == pytest.approx(psnr_db(black, grey))
    assert psnr_db(black, white) == pytest.approx([0, 0])
    assert psnr_db(grey, grey).tolist() == [math.inf] * 2
    # An error of 45 in one of 45 values.
    spotted = grey.copy()
    spotted[1, 0, 0, 0] = 96
    expected = [math.inf, 20 * math.log10(255 / math.sqrt(45))]
    assert psnr_db(grey, spotted) == pytest.approx(expected)


def test_sqnr_in_closed_form():
    signal = torch.tensor([3.0, -4.0])
    assert sqnr_db(signal, signal + torch.tensor([0.3, 0.4])) == pytest.approx(20, rel=1e-5)
    assert sqnr_db(signal, torch.zeros(2)) == pytest.approx(0)
    assert sqnr_db(signal, signal.clone()) == math.inf


def test_ssim_is_its_definition_in_every_window():
    random = np.random.default_rng(0)
    a = random.integers(0, 256, (2, 13, 12, 3), dtype=np.uint8)
    b = np.clip(a + random.normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    place = np.arange(-5, 6)
    window = np.exp(-(place[:, None] ** 2 + place ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    values = np.empty((2, 3, 2, 3))
    for i, row, column, channel in np.ndindex(values.shape):
        cut = (i, slice(row, row + 11), slice(column, column + 11), channel)
        x, y = a[cut].astype(float), b[cut].astype(float)
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        cov = (window * (x - mx) * (y - my)).sum()
        c1, c2 = 2.55 ** 2, 7.65 ** 2
        values[i, row, column, channel] = (
            (2 * mx * my + c1) * (2 * cov + c2)
            / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2)))
    np.testing.assert_allclose(metrics.ssim(a, b), values.mean(axis=(1, 2, 3)))


def test_ssim_of_equal_images_is_one_and_small_ones_are_refused():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_allclose(metrics.ssim(images, images), 1)
    with pytest.raises(ValueError, match="SSIM needs 11 pixels a side"):
        metrics.ssim(images[:, :10], images[:, :10])
