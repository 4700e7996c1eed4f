"""Layer-wise grid search for the migration strength (DiTAS, section 4.2).

The loss of a candidate with factors s is ``sum over timesteps of mean((X W^T - Qa(X/s) V^T)^2)``, where V is the candidate's quantised
weight: ``Q(W diag(s))``, or ``B diag(s)`` with one B shared by all candidates.

A shared B (O, I) that widens the layer is ``B = Q R`` with orthonormal columns Q (O, I) and an I x I matrix R, so that

    |X W^T - X' B^T|^2 = |X (Q^T W)^T - X' R^T|^2 + <X^T X, F^T F>,    F = W - Q Q^T W,

and candidates differ in products with I x I matrices only.
"""
import torch
from torch import Tensor

from quant.balancing.candidates import Candidates
from quant.balancing.losses import DEFINITION, Arithmetic
from quant.numerics.uniform import QuantSpec

BLOCK = 2 ** 19  # inputs or outputs handled at a time: what is computed of them is small


class AlphaSearch:
    """Accumulates the loss of every candidate for one layer while its inputs pass by.

    Args:
        weight: (O, I) float weight.
        bias: (O,), which the outputs hold, or None.
        factors: (A, I) smoothing factors of each candidate.
        weight_spec: how a candidate quantises ``W diag(s)``.
        act: the activation quantiser.
        shared: (O, I) quantised weight B that all candidates share instead (published DiTAS), or None.
        arithmetic: makes candidates and computes their losses.

    Attributes:
        loss: (A,) float64.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, factors: Tensor, weight_spec: QuantSpec, act: QuantSpec, shared: Tensor | None,
                 arithmetic: Arithmetic = DEFINITION):
        self.loss = torch.zeros(len(factors), dtype=torch.float64, device=weight.device)
        self._weight, self._factors, self._weight_spec, self._shared = weight, factors, weight_spec, shared
        self._arithmetic = arithmetic
        self._act, self._range_per_step = act.per_step(), act.granularity == "tensor"
        self._bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        self._target = self._rest = None
        if shared is not None and len(weight) > weight.shape[1]:
            basis, self._shared = torch.linalg.qr(shared)
            self._target, self._bias = basis.T @ weight, weight.new_zeros(weight.shape[1])
            rest = (weight - basis @ self._target).double()
            self._rest = rest.T @ rest

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Add the losses on inputs ``x`` (K, N, T, I) with float outputs ``y`` (K, N, T, O) of K timesteps."""
        step_size = y.numel() // len(y)  # outputs per timestep, over which the loss takes a mean
        x = x.flatten(1, 2) if self._range_per_step else x.flatten(0, 1)  # whatever shares a range is an entry: (B, R, I)
        y = y.reshape(*x.shape[:2], -1)
        candidates, entries = self._candidates(), max(1, BLOCK // max(x[0].numel(), y[0].numel()))
        for inputs, outputs in zip(x.split(entries), y.split(entries)):
            if self._rest is not None:
                outputs, rows = inputs @ self._target.T, inputs.flatten(0, 1)
                self.loss += ((rows.T @ rows).double() * self._rest).sum() / step_size
            self.loss += self._arithmetic.squared_errors(inputs, outputs, self._bias, candidates, self._act) / step_size

    def best(self) -> int:
        """Index of the first candidate of least loss."""
        return int(self.loss.argmin())

    def _candidates(self) -> Candidates:
        if self._shared is not None:
            return Candidates(self._factors, self._shared.expand(len(self._factors), -1, -1), columns=self._factors)
        return self._arithmetic.candidates(self._weight, self._factors, self._weight_spec)
