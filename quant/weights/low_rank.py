"""Training-free low-rank branch, found by alternating with the quantiser (DiTAS, 4.3; LoftQ).

``W ~ W_hat + L R``: quantise what the branch leaves over, then fit the branch to what the quantiser
leaves over, and so on.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.numerics.cholesky import damped_cholesky
from quant.numerics.floating import FloatWeight
from quant.numerics.uniform import Coded, Quantized
from quant.weights.rounding import WeightQuantizer
from quant.weights.two_level import LIMIT

MOMENT_DAMPING = 1e-4  # of the second moment's mean diagonal, added to its diagonal

# Rounds after which two-level steps are kept. They hardly move any more, and finding them is most
# of the work.
STEP_ROUNDS = 3

# The fast solver.
OVERSAMPLE = 16  # extra directions that it carries
FAST_ITERATIONS = 20  # double subspace iterations per round, warm-started
DIRECT_WIDTH = 512  # up to which all eigenvectors cost less than these iterations


class Approximation:
    """The approximation ``base.dequantize() + left @ right`` of a weight, however it is held.

    Attributes:
        base: the quantised part (O, I), or at 16 bits all of it.
        left: (O, r) float32.
        right: (r, I) float32.
    """

    base: Coded | FloatWeight
    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Compute the whole weight (O, I), float32."""
        return torch.addmm(self.base.dequantize(), self.left, self.right)


@dataclass(frozen=True)
class LowRankWeight(Approximation):
    """An approximation whose branch is tensors of its own (see ``Approximation``)."""

    base: Coded | FloatWeight
    left: Tensor
    right: Tensor

    def integer_branch(self, original: Tensor, moment: Tensor | None = None) -> "LowRankWeight":
        """Round the branch, so that one integer product serves the quantised part and the branch.

        ``right`` becomes integers of at most 127, ``left`` the best fit to them in bfloat16 values.

        Args:
            original: (O, I), the weight that this one approximates.
            moment: (I, I), of the inputs, as in ``lowrank_quantize``.
        """
        if not len(self.right):
            return self
        largest = self.right.abs().amax(1, keepdim=True)
        right = (self.right * (LIMIT / torch.where(largest > 0, largest, 1.0))).round()
        # Least squares.
        residual = (original - self.base.dequantize()).double()
        rows = right.double()
        weighted = rows if moment is None else rows @ moment.double()
        gram = rows @ weighted.T  # (r, r)
        left = residual @ weighted.T @ torch.linalg.pinv(gram, hermitian=True)
        return LowRankWeight(self.base, left.bfloat16().float(), right)


def without_branch(weight: Quantized) -> LowRankWeight:
    """Give a quantised weight an empty branch."""
    rows, columns = weight.codes.shape
    left = weight.scale.new_zeros(rows, 0)
    right = weight.scale.new_zeros(0, columns)
    return LowRankWeight(weight, left, right)


def exact_factors(
    matrix: Tensor, rank: int, basis: Tensor | None
) -> tuple[Tensor, Tensor, None]:
    """Compute the best approximation of a rank: ``L = U sqrt(S)``, ``R = sqrt(S) V^T`` by an SVD.

    Args:
        basis: not needed.

    Returns:
        L (O, rank), R (rank, I), and None as the next basis.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank], None


def fast_factors(
    matrix: Tensor, rank: int, basis: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute near-best ``L R`` from the leading eigenvectors of the short side's Gram matrix.

    Small matrices have their eigenvectors computed directly. Others get them by subspace iteration
    (Halko et al., 2011, algorithm 4.4).

    Suppose that the iteration starts from a ``basis`` which spans the columns of some matrix of
    rank ``rank``. Then the result is at least as near to ``matrix`` as that one is: projecting on
    its column space cannot be worse, and iterations only capture more.

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
        basis = _leading_eigenvectors(gram, rank + OVERSAMPLE, basis)
    left = basis[:, :rank]
    right = left.T @ matrix
    root = right.norm(dim=1).sqrt()  # of the singular values
    return left * root, right / torch.where(root > 0, root, 1.0)[:, None], basis


def _leading_eigenvectors(gram: Tensor, width: int, basis: Tensor | None) -> Tensor:
    """Iterate to the leading eigenvectors (n, width) of a Gram matrix, the first one first."""
    if basis is None:
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(len(gram), min(width, len(gram)), generator=generator).to(gram)
    for _ in range(FAST_ITERATIONS):
        basis = torch.linalg.qr(gram @ (gram @ basis)).Q
    # Rayleigh-Ritz; eigenvalues come in ascending order.
    _, vectors = torch.linalg.eigh(basis.T @ (gram @ basis))
    return basis @ vectors.flip(1)


SOLVERS = {"exact": exact_factors, "fast": fast_factors}


def lowrank_quantize(
    weight: Tensor,
    quantizer: WeightQuantizer,
    rank: int,
    rounds: int,
    keep: str,
    solver: str,
    moment: Tensor | None = None,
) -> LowRankWeight:
    """Alternate ``W_hat = Q(W - L R)`` and ``L R = best rank-r of (W - W_hat)`` from ``L R = 0``.

    Args:
        weight: (O, I) float32.
        quantizer: Q (see ``quant.weights.rounding``).
        rank: r; 0 leaves the branch empty and quantises once.
        rounds: alternations.
        keep: ``best`` returns the round of smallest error, ``last`` the last one (as published).
        solver: a key of ``SOLVERS``.
        moment: (I, I), second moment ``X^T X`` of the inputs, or any multiple of it. With it,
            errors are those of the output, ``|X (W - W_hat - L R)^T|``; None: of the weight.

    Raises:
        ValueError: the quantiser refuses the weight.
    """
    rank = min(rank, *weight.shape)
    if rank == 0:
        return without_branch(quantizer(weight, None))
    root = None if moment is None else moment_root(moment)
    left = weight.new_zeros(weight.shape[0], rank)
    right = weight.new_zeros(rank, weight.shape[1])
    best, best_error = None, float("inf")
    quantized, basis = None, None
    for number in range(rounds):
        # Quantise what the branch leaves over.
        target = torch.addmm(weight, left, right, alpha=-1)
        previous = quantized if number >= STEP_ROUNDS else None
        quantized = quantizer(target, previous)
        # Fit the branch to what the quantiser leaves over. Where errors are those of the output,
        # this happens in a basis in which inputs are uncorrelated and of size one.
        residual = weight - quantized.dequantize()
        whitened = residual if root is None else residual @ root  # (O, I)
        left, right, basis = SOLVERS[solver](whitened, rank, basis)
        error = torch.addmm(whitened, left, right, alpha=-1).norm().item()
        if root is not None:
            right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        if keep == "last" or error < best_error:
            best, best_error = LowRankWeight(quantized, left, right), error
    return best


def moment_root(moment: Tensor) -> Tensor:
    """Compute the lower triangular C with ``C C^T`` the damped second moment, (I, I).

    Damping keeps inputs that never varied from making it singular.
    """
    exact = moment.double()
    return damped_cholesky(exact, MOMENT_DAMPING * exact.diagonal().mean()).to(moment)
