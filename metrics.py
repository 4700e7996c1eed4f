"""Distances between what two models make: the mathematics only, on arrays, in float64."""
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """Signal to quantisation noise ratio in dB: ``10 log10(|reference|^2 / |reference - test|^2)``; inf where equal."""
    reference, test = reference.double(), test.double()
    noise = (reference - test).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise)) if noise > 0 else float("inf")


def frechet_distance(a: NDArray, b: NDArray) -> float:
    """Fréchet distance of two normals fitted to features (N, D) (Heusel et al., 2017, eq. 6).

    ``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``; the trace of the root is that of the symmetric
    ``C_a^(1/2) C_b C_a^(1/2)``, whose eigenvalues are real.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap)
