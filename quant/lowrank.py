"""Training-free low-rank branch, found by alternating with the quantiser (DiTAS, section 4.3; LoftQ).

``W ~ W_hat + L R``: quantise what the branch leaves over, then fit the branch to what the quantiser leaves over, and so on.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.quantizer import Quantized, QuantSpec, quantize

OVERSAMPLE = 16  # extra directions carried by the fast solver
FAST_ITERATIONS = 6  # subspace iterations per round, warm-started


@dataclass(frozen=True)
class LowRankWeight:
    """``weight.dequantize() + left @ right`` approximates a weight (O, I); ``left`` (O, r), ``right`` (r, I), float32."""

    weight: Quantized
    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        return torch.addmm(self.weight.dequantize(), self.left, self.right)


def exact_factors(matrix: Tensor, rank: int, basis: Tensor | None) -> tuple[Tensor, Tensor, None]:
    """Best rank-``rank`` approximation ``L R`` by a full SVD: ``L = U sqrt(S)``, ``R = sqrt(S) V^T``."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank], None


def fast_factors(matrix: Tensor, rank: int, basis: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Near-best ``L R`` by subspace iteration with Rayleigh-Ritz (Halko et al., 2011, algorithm 4.4).

    Started from a ``basis`` whose span holds a matrix's row space, the result is at least as near to ``matrix`` as that
    matrix: one iteration keeps ``A V V^T`` within reach, and further ones only improve the captured energy.

    Args:
        basis: (I, k) start, or None for a seeded random one.

    Returns:
        L (O, rank), R (rank, I) and the basis (I, k) to start the next, similar matrix from.
    """
    if basis is None:
        width = min(rank + OVERSAMPLE, *matrix.shape)
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    for _ in range(FAST_ITERATIONS):
        q = torch.linalg.qr(matrix @ basis).Q  # (O, k)
        basis = matrix.T @ q  # (I, k)
    v, s, ut = torch.linalg.svd(basis, full_matrices=False)  # matrix ~ q basis^T = (q u) s v^T
    root = s[:rank].sqrt()
    return (q @ ut.T)[:, :rank] * root, root[:, None] * v.T[:rank], v


SOLVERS = {"exact": exact_factors, "fast": fast_factors}


def lowrank_quantize(weight: Tensor, spec: QuantSpec, rank: int, rounds: int, keep: str, solver: str) -> LowRankWeight:
    """Alternate ``W_hat = Q(W - L R)`` and ``L R = best rank-r of (W - W_hat)``, starting from ``L R = 0``.

    Args:
        weight: (O, I) float32.
        rank: 0 plainly quantises.
        rounds: alternations.
        keep: ``best`` returns the round of smallest ``|W - W_hat - L R|``, ``last`` the last one (as published).
        solver: a key of ``SOLVERS``.

    Raises:
        ValueError: as ``quantize``.
    """
    rank = min(rank, *weight.shape)
    left, right = weight.new_zeros(weight.shape[0], rank), weight.new_zeros(rank, weight.shape[1])
    if rank == 0:
        return LowRankWeight(quantize(weight, spec), left, right)
    best, best_error, basis = None, float("inf"), None
    for _ in range(rounds):
        quantized = quantize(torch.addmm(weight, left, right, alpha=-1), spec)
        residual = weight - quantized.dequantize()
        left, right, basis = SOLVERS[solver](residual, rank, basis)
        error = torch.addmm(residual, left, right, alpha=-1).norm().item()
        if keep == "last" or error < best_error:
            best, best_error = LowRankWeight(quantized, left, right), error
    return best
