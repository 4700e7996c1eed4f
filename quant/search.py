"""Layer-wise grid search for the migration strength (DiTAS, section 4.2).

The loss of a candidate with factors s is ``sum over timesteps of mean((X W^T - Qa(X/s) (V diag(s))^T)^2)``, where V is the
quantised weight seen from the unsmoothed input: ``Q(W diag(s)) / s``, or one V shared by all candidates.

With D = X - Qa(X/s) diag(s) (what rounding took from the input) and E = V - W (what it added to the weight), the difference
of outputs is ``D V^T - X E^T``, so that its squared norm is

    <D, D G - 2 X M> + <X^T X, F>,    G = V^T V,  M = E^T V,  F = E^T E    (each I x I)

Nothing large cancels in it: D and E are rounding errors. A candidate then costs one or two products with an I x I matrix
where the plain form costs one with an O x I: cheaper when the layer widens.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from quant.quantizer import QuantSpec, fake_quantize


class _Products(NamedTuple):
    gram: Tensor  # G (I, I)
    cross: Tensor  # -2 X M (rows, I)
    constant: Tensor  # <X^T X, F>


def _products(weight: Tensor, v: Tensor, x: Tensor, covariance: Tensor) -> _Products:
    e = v - weight
    return _Products(v.T @ v, x @ (-2 * e.T @ v), (covariance * (e.T @ e)).sum(dtype=torch.float64))


class AlphaSearch:
    """Accumulates the loss of every candidate for one layer while its inputs pass by.

    Args:
        weight: (O, I) float weight.
        factors: (A, I) smoothing factors of each candidate.
        weight_spec: how a candidate quantises ``W diag(s)``.
        act: the activation quantiser.
        shared: (O, I) quantised weight V that all candidates share instead (published DiTAS), or None.

    Attributes:
        loss: (A,) float64.
    """

    def __init__(self, weight: Tensor, factors: Tensor, weight_spec: QuantSpec, act: QuantSpec, shared: Tensor | None):
        self.loss = torch.zeros(len(factors), dtype=torch.float64, device=weight.device)
        self._weight, self._factors, self._weight_spec, self._shared = weight, factors, weight_spec, shared
        self._act, self._range_per_step = act.per_step(), act.granularity == "tensor"
        rows, columns = weight.shape
        self._wide = rows > columns * (2 if shared is None else 1)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Add the losses on inputs ``x`` (K, N, T, I) with float outputs ``y`` (K, N, T, O), without bias, of K timesteps."""
        step_size = y.numel() // len(y)  # outputs per timestep, over which the loss takes a mean
        x = x.flatten(1, 2) if self._range_per_step else x.flatten(0, 1)  # (K, N*T, I) or (K*N, T, I)
        rows, y = x.flatten(0, 1), y.flatten(0, 2)  # (K*N*T, I), (K*N*T, O)
        covariance = rows.T @ rows if self._wide else None
        products = None
        for i, s in enumerate(self._factors):
            v = fake_quantize(self._weight * s, self._weight_spec).div_(s) if self._shared is None else self._shared
            q = fake_quantize(x / s, self._act).flatten(0, 1)
            if self._wide:
                if products is None or self._shared is None:
                    products = _products(self._weight, v, rows, covariance)
                d = torch.addcmul(rows, q, s, value=-1)
                energy = torch.linalg.vecdot(d, torch.addmm(products.cross, d, products.gram)).sum(dtype=torch.float64) + products.constant
            else:
                energy = torch.addmm(y, q, (v * s).T, beta=-1).square_().sum(dtype=torch.float64)
            self.loss[i] += energy / step_size

    def best(self) -> int:
        """Index of the first candidate of least loss."""
        return int(self.loss.argmin())
