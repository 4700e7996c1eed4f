"""Distances between sets of images: the mathematics only, on feature arrays.

FID, sFID, Inception Score, precision and recall are those of the ADM evaluation suite
(Dhariwal & Nichol, 2021). Float64 is used where it matters.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

ROWS = 1000  # rows of a distance matrix, or features of a covariance, handled at a time
BLOCK = 10_000  # rows and columns of distances that ADM's evaluator computes together
NEIGHBOURS = 3
IS_SPLIT = 5000
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """Compute the signal to quantisation noise ratio in dB.

    ``10 log10(|reference|^2 / |reference - test|^2)``; infinite where the two are equal.
    """
    reference, test = reference.double(), test.double()
    noise = (reference - test).square().sum()
    if not noise > 0:
        return float("inf")
    return float(10 * torch.log10(reference.square().sum() / noise))


def psnr_db(reference: NDArray, test: NDArray) -> NDArray:
    """Compute the peak signal to noise ratio in dB of each pair of uint8 images (N, H, W, C).

    ``20 log10(255 / rms)``, (N,); infinite where the two are equal.
    """
    error = np.square(reference.astype(np.float64) - test).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0 ** 2 / error)


def ssim(a: NDArray, b: NDArray) -> NDArray:
    """Compute the structural similarity of each pair of uint8 images (N, H, W, C); (N,).

    Wang et al. (2004), equation 13, under their Gaussian window of 11 x 11 pixels wherever it fits
    into the image; the mean over places and channels.

    Raises:
        ValueError: an image is smaller than the window.
    """
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels a side, and images are "
                         f"{a.shape[1]}x{a.shape[2]}")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    # Variances and covariance: E[x^2] - E[x]^2.
    variance_x = _blur(x * x) - mean_x ** 2
    variance_y = _blur(y * y) - mean_y ** 2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness /= (mean_x ** 2 + mean_y ** 2 + c1) * (variance_x + variance_y + c2)
    return likeness.mean(axis=(1, 2, 3))


def _blur(images: NDArray) -> NDArray:
    """Average (N, H, W, C) under SSIM's window: (N, H - 10, W - 10, C)."""
    place = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-place ** 2 / (2 * SSIM_SIGMA ** 2))
    weights /= weights.sum()
    for axis in (1, 2):
        images = sliding_window_view(images, SSIM_WINDOW, axis) @ weights
    return images


@dataclass(frozen=True)
class Statistics:
    """A normal distribution fitted to features: ``mean`` (D,), ``covariance`` (D, D), float64."""

    mean: NDArray
    covariance: NDArray

    def __post_init__(self):
        if self.covariance.shape != (len(self.mean),) * 2 or self.mean.ndim != 1:
            raise ValueError(
                f"a mean of shape {self.mean.shape} does not go with "
                f"a covariance of {self.covariance.shape}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("the statistics hold NaN or infinity")


def statistics(features: NDArray) -> Statistics:
    """Compute the mean and unbiased covariance of features (N, D).

    Raises:
        ValueError: fewer than two of them, or a value is not finite.
    """
    check_features(features)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {len(features)}")
    mean = features.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((len(mean),) * 2)
    for start in range(0, len(features), ROWS):
        centred = features[start:start + ROWS] - mean
        scatter += centred.T @ centred
    return Statistics(mean, scatter / (len(features) - 1))


def check_features(features: NDArray) -> None:
    """Check that features are finite and (N, D).

    Raises:
        ValueError: they are not.
    """
    if features.ndim != 2 or not features.size:
        raise ValueError(f"expected features of shape (N, D), got {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("the features hold NaN or infinity")


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Compute the Fréchet distance of two normals (Heusel et al., 2017, eq. 6).

    ``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``. The trace of the root is that of the
    symmetric ``C_a^(1/2) C_b C_a^(1/2)``, whose eigenvalues are real, also where a covariance is
    singular.

    Raises:
        ValueError: the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of width {len(a.mean)} and {len(b.mean)} cannot be compared")
    values, vectors = np.linalg.eigh(a.covariance)
    # Any root will do: root root^T = C_a.
    root = vectors * np.sqrt(values.clip(min=0))
    overlap = np.sqrt(np.linalg.eigvalsh(root.T @ b.covariance @ root).clip(min=0)).sum()
    shift = np.square(a.mean - b.mean).sum()
    distance = shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return float(max(distance, 0.0))


def inception_score(logits: NDArray, split: int = IS_SPLIT) -> float:
    """Compute the Inception Score of logits (N, K) (Salimans et al., 2016).

    It is the mean over splits of ``exp(mean KL(p(y|x) || p(y)))``. Splits are taken in order; a
    short last one counts as much as the others.
    """
    check_features(logits)
    scores = []
    for start in range(0, len(logits), split):
        part = torch.from_numpy(np.asarray(logits[start:start + split], np.float64))
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(log_p))
        divergence = ((log_p - log_marginal) * log_p.exp()).sum(1)  # KL, (split,)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores))


def precision_recall(
    reference: NDArray,
    samples: NDArray,
    half: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al., 2019) with 3 neighbours.

    Precision is the share of samples inside the union of balls around reference features, recall
    the share of reference features inside the union of balls around samples. A ball's squared
    radius is the squared distance to the third neighbour (the fourth smallest, itself included).
    Its surface belongs to it.

    Args:
        reference, samples: (N, D), (M, D).
        half: squared distances in float16, as ADM's evaluator computes them. A block of
            ``BLOCK`` x ``BLOCK`` of them is computed in float32 if one overflows.

    Raises:
        ValueError: widths differ, fewer than 4 features, or a value is not finite.
    """
    for features in (reference, samples):
        check_features(features)
        if len(features) <= NEIGHBOURS:
            raise ValueError(
                "precision and recall need at least "
                f"{NEIGHBOURS + 1} images, got {len(features)}")
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"features of width {reference.shape[1]} and {samples.shape[1]} cannot be compared")
    strips = _half_strips if half else _strips

    # The balls around each feature.
    real = torch.tensor(reference, dtype=torch.float32, device=device)  # (N, D)
    generated = torch.tensor(samples, dtype=torch.float32, device=device)  # (M, D)
    real_radii = _squared_radii(real, strips)  # (N,)
    generated_radii = _squared_radii(generated, strips)  # (M,)

    # Who lies in whose ball.
    covered = torch.zeros(len(generated), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)
    for rows, columns, d in _distances(real, generated, strips):
        covered[columns] |= (d <= real_radii[rows, None]).any(0)
        recalled[rows] |= (d <= generated_radii[columns]).any(1)
    return float(covered.double().mean()), float(recalled.double().mean())


# Rows (N, D) and (M, D) of a block to their squared distances, in strips (<= ROWS, M) of the first.
Strips = Callable[[Tensor, Tensor], Iterator[Tensor]]


def _squared_radii(x: Tensor, strips: Strips) -> Tensor:
    """Compute the squared distance of each row (N, D) to its third neighbour, (N,)."""
    # A row's own distance, 0, is the smallest.
    nearest = torch.full((len(x), NEIGHBOURS + 1), torch.inf, device=x.device)
    for rows, _, d in _distances(x, x, strips):
        both = torch.cat([nearest[rows], d], 1)
        nearest[rows] = both.topk(NEIGHBOURS + 1, largest=False).values
    return nearest[:, -1]


def _distances(a: Tensor, b: Tensor, strips: Strips) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield squared distances (<= ROWS, <= BLOCK) of some of a's rows to some of b's.

    Before them stand the rows of ``a`` and of ``b`` that they belong to.
    """
    for i, rows in enumerate(a.split(BLOCK)):
        for j, others in enumerate(b.split(BLOCK)):
            columns = slice(j * BLOCK, j * BLOCK + len(others))
            start = i * BLOCK
            for d in strips(rows, others):
                yield slice(start, start + len(d)), columns, d
                start += len(d)


def _strips(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Compute squared distances of rows (N, D) and (M, D) in float32."""
    b_norms = b.square().sum(1)
    for rows in a.split(ROWS):
        norms = rows.square().sum(1)[:, None] + b_norms
        yield torch.addmm(norms, rows, b.T, alpha=-2).clamp_(min=0)


def _half_strips(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Compute them in float16; if a single one overflows, all of the block in float32."""
    y, y_norms = _half(b)
    block = []
    for rows in a.split(ROWS):
        x, x_norms = _half(rows)
        products = (x @ y.T).half()
        d = (x_norms[:, None] - 2 * products + y_norms).clamp_(min=0)
        if not torch.isfinite(d).all():
            return _strips(a, b)
        block.append(d)
    return (d.float() for d in block)


def _half(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows (N, D) to float16, and their squared norms (N,).

    The rows are given as float32, in which sums and products accumulate.
    """
    half = rows.half()
    norms = half.square().sum(1, dtype=torch.float32).half()
    return half.float(), norms
