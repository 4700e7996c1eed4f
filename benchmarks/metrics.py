"""What the five numbers cost on the CPU at the size of a usual evaluation.

    python benchmarks/metrics.py                     # minutes, most of them in scipy.linalg.sqrtm
    python benchmarks/metrics.py --only precision-recall

Features are random and as wide as Inception's.

precision-recall  10K samples against 10K reference features, each number format in a process of
                  its own; bars: 20 s, 1 GB
fid               two 2048-wide normals, against the general matrix square root of the product of
                  their covariances; bar: 5 s
"""
import multiprocessing
import resource
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.linalg

from benchmarks.sections import run_sections, timed
from evaluation.metrics import frechet_distance, precision_recall, statistics

COUNT = 10_000  # images
WIDTH = 2048  # of their features
FACTORS = 64  # directions along which features mostly vary


def random_features(count: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """Draw non-negative features (count, WIDTH) without temporary copies."""
    loadings = np.random.default_rng(0).standard_normal((FACTORS, WIDTH), np.float32)
    loadings = loadings / FACTORS ** 0.5
    rng = np.random.default_rng(seed)
    features = np.empty((count, WIDTH), np.float32)
    for first in range(0, count, 500):
        block = features[first:first + 500]
        block[:] = spread * rng.standard_normal((len(block), FACTORS), np.float32) @ loadings
        block += 0.1 * rng.standard_normal(block.shape, np.float32)
    return np.maximum(features, 0, out=features)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_precision_recall(half: bool) -> tuple[tuple[float, float], float, float]:
    """Return precision and recall, seconds, and growth of the peak resident set in MB."""
    reference = random_features(COUNT, seed=1)
    samples = random_features(COUNT, seed=2, spread=0.9)
    precision_recall(reference[:100], samples[:100], half)  # library code is in memory before
    before = peak_mb()
    values, seconds = timed(partial(precision_recall, reference, samples, half))
    return values, seconds, peak_mb() - before


def precision_recall_table() -> None:
    print(f"\n{COUNT} x {COUNT} features of width {WIDTH}; bars: 20 s, 1000 MB\n")
    print("| distances | precision | recall | time, s | growth of peak memory, MB |")
    print("|---|---|---|---|---|")
    values = {}
    for name, half in (("float32", False), ("float16", True)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            values[name], seconds, growth = pool.apply(measure_precision_recall, (half,))
        precision, recall = values[name]
        print(f"| {name} | {precision:.4f} | {recall:.4f} | {seconds:.1f} | {growth:.0f} |",
              flush=True)
    precision, recall = np.subtract(values["float16"], values["float32"])
    print(f"| float16 - float32 | {precision:+.4f} | {recall:+.4f} | | |")


def fid_table() -> None:
    a = statistics(random_features(COUNT, seed=1))
    b = statistics(random_features(COUNT, seed=2, spread=0.9))
    print(f"\nFID of two normals of width {WIDTH}; bar: 5 s\n")
    print("| square root | FID | time, s |")
    print("|---|---|---|")

    ours, seconds = timed(partial(frechet_distance, a, b))
    print(f"| symmetric (metrics.frechet_distance) | {ours:.6f} | {seconds:.1f} |", flush=True)

    root, seconds = timed(lambda: scipy.linalg.sqrtm(a.covariance @ b.covariance))
    general = np.square(a.mean - b.mean).sum()
    general = general + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    print(f"| general (scipy.linalg.sqrtm) | {general:.6f} | {seconds:.1f} |")
    print(f"| relative difference | {ours / general - 1:+.1e} | |")


if __name__ == "__main__":
    run_sections(__doc__, {"precision-recall": precision_recall_table, "fid": fid_table})
