"""Training-free low-rank branch, found by alternating with the quantiser (DiTAS, section 4.3; LoftQ).

``W ~ W_hat + L R``: quantise what the branch leaves over, then fit the branch to what the quantiser leaves over, and so on.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.numerics.uniform import Quantized
from quant.weights.rounding import WeightQuantizer
from quant.weights.two_level import LIMIT

OVERSAMPLE = 16  # extra directions carried by the fast solver
DAMPING = 1e-4  # of the second moment's mean diagonal, added to its diagonal
STEP_ROUNDS = 3  # after which two-level steps are kept: they hardly move any more, and finding them is most of the work
FAST_ITERATIONS = 20  # double subspace iterations per round, warm-started
DIRECT_WIDTH = 512  # up to which all eigenvectors cost less than these iterations


@dataclass(frozen=True)
class LowRankWeight:
    """``base.dequantize() + left @ right`` approximates a weight (O, I); ``left`` (O, r), ``right`` (r, I), float32."""

    base: Quantized
    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        return torch.addmm(self.base.dequantize(), self.left, self.right)

    def integer_branch(self, original: Tensor, moment: Tensor | None = None) -> "LowRankWeight":
        """The same with ``right`` rounded to integers of at most 127 and ``left`` the best fit to them, in bfloat16 values.

        So that one integer product serves the quantised weight and the branch.

        Args:
            original: (O, I), the weight that this one approximates.
            moment: (I, I), of the inputs, as in ``lowrank_quantize``.
        """
        if not len(self.right):
            return self
        peak = self.right.abs().amax(1, keepdim=True)
        right = (self.right * (LIMIT / torch.where(peak > 0, peak, 1.0))).round()
        residual, whole = (original - self.base.dequantize()).double(), right.double()
        seen = whole if moment is None else whole @ moment.double()
        left = residual @ seen.T @ torch.linalg.pinv(whole @ seen.T, hermitian=True)  # least squares
        return LowRankWeight(self.base, left.bfloat16().float(), right)


def without_branch(weight: Quantized) -> LowRankWeight:
    """A quantised weight with an empty branch."""
    rows, columns = weight.codes.shape
    return LowRankWeight(weight, weight.scale.new_zeros(rows, 0), weight.scale.new_zeros(0, columns))


def exact_factors(matrix: Tensor, rank: int, basis: Tensor | None) -> tuple[Tensor, Tensor, None]:
    """Best rank-``rank`` approximation ``L R`` by a full SVD: ``L = U sqrt(S)``, ``R = sqrt(S) V^T``."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank], None


def fast_factors(matrix: Tensor, rank: int, basis: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Near-best ``L R`` from the leading eigenvectors of the short side's Gram matrix.

    Of small matrices they are found directly, of others by subspace iteration (Halko et al., 2011, algorithm 4.4). Started from a ``basis`` that spans the column space of a rank-``rank`` matrix, the result is at least as near to
    ``matrix`` as that one is: projecting on its column space cannot be worse, and iterations only capture more.

    Args:
        basis: orthonormal (short side, k) start of the iteration, or None for a seeded random one.

    Returns:
        L (O, rank), R (rank, I) and the basis to start the next, similar matrix from.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right, basis = fast_factors(matrix.T, rank, basis)
        return right.T, left.T, basis
    gram = matrix @ matrix.T
    if len(matrix) <= DIRECT_WIDTH:
        basis = torch.linalg.eigh(gram).eigenvectors.flip(1)
    else:
        basis = _iterate(gram, rank + OVERSAMPLE, basis)
    right = basis[:, :rank].T @ matrix
    root = right.norm(dim=1).sqrt()  # of the singular values
    return basis[:, :rank] * root, right / torch.where(root > 0, root, 1.0)[:, None], basis


def _iterate(gram: Tensor, width: int, basis: Tensor | None) -> Tensor:
    """Leading eigenvectors (n, width) of a Gram matrix, the first one first."""
    if basis is None:
        basis = torch.randn(len(gram), min(width, len(gram)), generator=torch.Generator().manual_seed(0)).to(gram)
    for _ in range(FAST_ITERATIONS):
        basis = torch.linalg.qr(gram @ (gram @ basis)).Q
    _, vectors = torch.linalg.eigh(basis.T @ (gram @ basis))  # Rayleigh-Ritz, ascending
    return basis @ vectors.flip(1)


SOLVERS = {"exact": exact_factors, "fast": fast_factors}


def lowrank_quantize(weight: Tensor, quantizer: WeightQuantizer, rank: int, rounds: int, keep: str, solver: str,
                     moment: Tensor | None = None) -> LowRankWeight:
    """Alternate ``W_hat = Q(W - L R)`` and ``L R = best rank-r of (W - W_hat)``, starting from ``L R = 0``.

    Args:
        weight: (O, I) float32.
        quantizer: Q (see ``quant.weights``).
        rank: 0 plainly quantises.
        rounds: alternations.
        keep: ``best`` returns the round of smallest error, ``last`` the last one (as published).
        solver: a key of ``SOLVERS``.
        moment: (I, I), second moment ``X^T X`` of the inputs, by any factor: errors are those of the output, ``|X (W - W_hat - L R)^T|``;
            None: those of the weight.

    Raises:
        ValueError: as the quantiser.
    """
    rank = min(rank, *weight.shape)
    if rank == 0:
        return without_branch(quantizer(weight, None))
    root = None if moment is None else moment_root(moment)
    left, right = weight.new_zeros(weight.shape[0], rank), weight.new_zeros(rank, weight.shape[1])
    best, best_error, basis = None, float("inf"), None
    quantized = None
    for number in range(rounds):
        quantized = quantizer(torch.addmm(weight, left, right, alpha=-1), quantized if number >= STEP_ROUNDS else None)
        residual = weight - quantized.dequantize()
        seen = residual if root is None else residual @ root  # (O, I): in a basis where inputs are uncorrelated and of size one
        left, right, basis = SOLVERS[solver](seen, rank, basis)
        error = torch.addmm(seen, left, right, alpha=-1).norm().item()
        if root is not None:
            right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        if keep == "last" or error < best_error:
            best, best_error = LowRankWeight(quantized, left, right), error
    return best


def moment_root(moment: Tensor) -> Tensor:
    """Lower triangular C with ``C C^T`` the second moment (I, I), damped so that inputs which never varied do not make it singular."""
    damped = moment.double().clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    return torch.linalg.cholesky(damped).to(moment)
