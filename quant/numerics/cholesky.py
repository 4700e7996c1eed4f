"""Factorise second moments, which rounding may have made indefinite."""
import torch
from torch import Tensor

TRIES = 5  # of ten times more damping each


def damped_cholesky(moment: Tensor, damping: Tensor) -> Tensor:
    """Compute the lower triangular C with ``C C^T = M + d I``, (I, I).

    ``d`` is ``damping``, or 10, 100, … times that: the first with which it can be done. Where one
    direction of the inputs has nearly all of their size, the rounding errors of a float32 sum
    ``X^T X`` may be larger than the damping, and its smallest eigenvalues negative.

    Args:
        moment: M, (I, I).
        damping: a number.

    Raises:
        ValueError: it cannot be done, as where values are not finite.
    """
    for _ in range(TRIES):
        damped = moment.clone()
        damped.diagonal().add_(damping)
        factor, failed_at = torch.linalg.cholesky_ex(damped)
        if failed_at == 0:
            return factor
        damping = 10 * damping
    raise ValueError("the second moment of a layer's inputs has no Cholesky factor: "
                     "expected finite inputs")
