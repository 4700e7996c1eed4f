"""What the five numbers cost on the CPU at the size of a usual evaluation, on random features of Inception's width.

    python benchmarks/metrics.py                     # a few minutes, most of them in scipy.linalg.sqrtm
    python benchmarks/metrics.py --only precision-recall

precision-recall  10K samples against 10K reference features, each number format in a process of its own; bars: 20 s, 1 GB
fid               of two 2048-wide normals, against the general matrix square root of the product of covariances; bar: 5 s
"""
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.linalg

from benchmarks.sections import run_sections
from evaluation.metrics import frechet_distance, precision_recall, statistics

COUNT, WIDTH, FACTORS = 10_000, 2048, 64


def random_features(count: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """Non-negative features (count, WIDTH) that vary mostly along FACTORS directions, made without temporary copies."""
    loadings = np.random.default_rng(0).standard_normal((FACTORS, WIDTH), np.float32) / FACTORS ** 0.5
    rng = np.random.default_rng(seed)
    features = np.empty((count, WIDTH), np.float32)
    for begin in range(0, count, 500):
        block = features[begin:begin + 500]
        block[:] = spread * rng.standard_normal((len(block), FACTORS), np.float32) @ loadings
        block += 0.1 * rng.standard_normal(block.shape, np.float32)
    return np.maximum(features, 0, out=features)


def timed(call: Callable):
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_precision_recall(half: bool) -> tuple[tuple[float, float], float, float]:
    """Values, seconds, growth of the peak resident set in MB."""
    reference, samples = random_features(COUNT, seed=1), random_features(COUNT, seed=2, spread=0.9)
    precision_recall(reference[:100], samples[:100], half)  # so that library code is in memory before
    before = peak_mb()
    values, seconds = timed(lambda: precision_recall(reference, samples, half))
    return values, seconds, peak_mb() - before


def precision_recall_table() -> None:
    print(f"\n{COUNT} x {COUNT} features of width {WIDTH}; bars: 20 s, 1000 MB\n")
    print("| distances | precision | recall | time, s | growth of peak memory, MB |")
    print("|---|---|---|---|---|")
    found = {}
    for name, half in (("float32", False), ("float16", True)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name], seconds, growth = pool.apply(measure_precision_recall, (half,))
        print(f"| {name} | {found[name][0]:.4f} | {found[name][1]:.4f} | {seconds:.1f} | {growth:.0f} |", flush=True)
    precision, recall = (b - a for a, b in zip(found["float32"], found["float16"]))
    print(f"| float16 - float32 | {precision:+.4f} | {recall:+.4f} | | |")


def fid_table() -> None:
    a, b = (statistics(random_features(COUNT, seed, spread)) for seed, spread in ((1, 1.0), (2, 0.9)))
    print(f"\nFID of two normals of width {WIDTH}; bar: 5 s\n")
    print("| square root | FID | time, s |")
    print("|---|---|---|")
    ours, seconds = timed(lambda: frechet_distance(a, b))
    print(f"| symmetric (metrics.frechet_distance) | {ours:.6f} | {seconds:.1f} |", flush=True)
    root, seconds = timed(lambda: scipy.linalg.sqrtm(a.covariance @ b.covariance))
    general = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    print(f"| general (scipy.linalg.sqrtm) | {general:.6f} | {seconds:.1f} |\n| relative difference | {ours / general - 1:+.1e} | |")


if __name__ == "__main__":
    run_sections(__doc__, {"precision-recall": precision_recall_table, "fid": fid_table})
