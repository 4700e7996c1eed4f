"""Smoothing: what happens to an activation before it is quantised, and to the weight behind it.

Factors s multiply the input channels of a weight and divide its inputs, which leaves the product
as it is: ``(W diag(s)) (x / s) = W x``. Only magnitudes move from one side to the other.
"""
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Smoothing:
    """The change ``(x + shift) / factors`` of an input x (..., I) before it is quantised.

    Attributes:
        factors: (I,) float32; None for ones.
        shift: (I,) float32; None for zeros (only RepQ-ViT has one).
        alpha: the migration strength that the factors came from; None where there is none.
        losses: (A,) float64, one per migration strength that was searched; None without a search.
    """

    factors: Tensor | None = None
    shift: Tensor | None = None
    alpha: float | None = None
    losses: Tensor | None = None

    @property
    def is_none(self) -> bool:
        """Whether inputs and weights stay as they are."""
        return self.factors is None and self.shift is None

    def of_input(self, x: Tensor) -> Tensor:
        """Shift and divide inputs (..., I)."""
        if self.shift is not None:
            x = x + self.shift
        return x if self.factors is None else x / self.factors

    def of_weight(self, weight: Tensor) -> Tensor:
        """Compute ``W diag(s)`` for a weight (O, I)."""
        return weight if self.factors is None else weight * self.factors

    def of_moment(self, moment: Tensor) -> Tensor:
        """Compute ``X^T X`` (I, I) of the divided inputs from that of the inputs, without shift."""
        return moment if self.factors is None else moment / self.factors / self.factors[:, None]


NO_SMOOTHING = Smoothing()
