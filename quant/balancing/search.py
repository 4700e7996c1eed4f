"""Layer-wise grid search for the migration strength (DiTAS, section 4.2).

The loss of a candidate with factors s is

    sum over timesteps of mean((X W^T - Qa(X/s) V^T)^2),

where V is the candidate's quantised weight: ``Q(W diag(s))``, or ``B diag(s)`` with one B shared by
all candidates.

A shared B (O, I) that widens the layer is ``B = Q R`` with orthonormal columns Q (O, I) and an
I x I matrix R, so that

    |X W^T - X' B^T|^2 = |X (Q^T W)^T - X' R^T|^2 + <X^T X, F^T F>,    F = W - Q Q^T W,

and candidates differ in products with I x I matrices only.
"""
import torch
from torch import Tensor

from quant.balancing.candidates import Candidates
from quant.balancing.losses import DEFINITION, Arithmetic
from quant.numerics.compiled import compiled_available
from quant.numerics.spec import OFF_BITS, QuantSpec

# Inputs or outputs handled at a time: what is computed of them is small.
BLOCK_VALUES = 2 ** 19


def fastest(device: torch.device, act: QuantSpec) -> Arithmetic:
    """Choose the compiled arithmetic where it can be had, else ``DEFINITION``.

    It needs a CPU, numba, and an activation quantiser ``act`` that is not off.
    """
    if act.bits == OFF_BITS or not compiled_available(device):
        return DEFINITION
    # Not at the top of the file: numba is optional.
    from quant.balancing.compiled import FUSED
    return FUSED


class AlphaSearch:
    """Accumulates the loss of every candidate for one layer while its inputs pass by.

    Args:
        weight: (O, I) float weight; of another type than float32, or where the inputs are not, it
            is copied while it is used.
        bias: (O,), which the outputs hold, or None.
        factors: (A, I) smoothing factors of each candidate.
        weight_spec: how a candidate quantises ``W diag(s)``.
        act: the activation quantiser.
        shared: (O, I) quantised weight B that all candidates share instead (published DiTAS),
            or None.
        arithmetic: makes candidates and computes their losses.

    Attributes:
        loss: (A,) float64.
    """

    def __init__(
            self, weight: Tensor, bias: Tensor | None, factors: Tensor, weight_spec: QuantSpec,
            act: QuantSpec, shared: Tensor | None, arithmetic: Arithmetic = DEFINITION):
        device = factors.device
        self.loss = torch.zeros(len(factors), dtype=torch.float64, device=device)
        self._weight = weight
        no_bias = torch.zeros(len(weight), device=device)
        self._bias = no_bias if bias is None else bias.detach().to(device)
        self._factors = factors
        self._weight_spec = weight_spec
        self._act = act.per_step()
        self._range_per_step = act.granularity == "tensor"
        self._shared = shared
        self._arithmetic = arithmetic
        # Q^T W and F^T F of the module's docstring, (I, I), where outputs are projected.
        self._target = None
        self._residual = None
        if shared is not None and len(weight) > weight.shape[1]:
            self._project(shared)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Add the losses on inputs of K timesteps.

        Args:
            x: (K, N, T, I).
            y: (K, N, T, O), the float outputs.
        """
        # Outputs per timestep, over which the loss takes a mean.
        step_size = y.numel() // len(y)
        # Whatever shares a range is an entry: (B, R, I).
        x = x.flatten(1, 2) if self._range_per_step else x.flatten(0, 1)
        y = y.reshape(*x.shape[:2], -1)
        entries = max(1, BLOCK_VALUES // max(x[0].numel(), y[0].numel()))
        candidates = self._candidates()
        for inputs, outputs in zip(x.split(entries), y.split(entries)):
            if self._target is not None:
                outputs = inputs @ self._target.T
                rows = inputs.flatten(0, 1)
                self.loss += ((rows.T @ rows).double() * self._residual).sum() / step_size
            errors = self._arithmetic.squared_errors(
                inputs, outputs, self._bias, candidates, self._act)
            self.loss += errors / step_size

    def _project(self, shared: Tensor) -> None:
        """Compare R with the projected weight from now on, in place of B with the weight."""
        basis, self._shared = torch.linalg.qr(shared)
        weight = self._float_weight()
        self._target = basis.T @ weight
        # The projected outputs are computed from the inputs, without a bias.
        self._bias = torch.zeros(weight.shape[1], device=weight.device)
        residual = (weight - basis @ self._target).double()
        self._residual = residual.T @ residual

    def _candidates(self) -> Candidates:
        if self._shared is None:
            return self._arithmetic.candidates(
                self._float_weight(), self._factors, self._weight_spec)
        values = self._shared.expand(len(self._factors), -1, -1)
        return Candidates(self._factors, values, columns=self._factors)

    def _float_weight(self) -> Tensor:
        return self._weight.to(self._factors.device).float()
