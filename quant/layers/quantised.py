"""What quantisation found for one linear."""
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.activations.quantisers import Activation
from quant.weights.low_rank import LowRankWeight


@dataclass(frozen=True)
class QuantizedLayer:
    """What quantisation found for one linear: ``W diag(smooth) ~ weight``.

    Attributes:
        act: how its input is quantised; None leaves it in floating point.
        smooth: (I,) float32, divides the input; None for all ones.
        rows: (O,) float32, multiplies the output channels (what folding put there); None for all ones.
        shift: (I,) float32, is added to the input before it is divided, and its effect taken from the output; None for zeros.
    """

    weight: LowRankWeight
    act: Activation | None
    smooth: Tensor | None = None
    rows: Tensor | None = None
    shift: Tensor | None = None

    def factored(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """V (O, I), step (O,), L (O, r) and R (r, I) such that the weight is ``diag(step) V + L R``.

        V holds integers where the layout allows it; elsewhere it is the whole weight, step is None and the rank 0.
        """
        found = self.weight.base.integers()
        if found is None:
            dense = self.weight.dense()
            empty = dense.new_zeros(len(dense), 0), dense.new_zeros(0, dense.shape[1])
            return (dense if self.rows is None else dense * self.rows[:, None]), None, *empty
        values, step = found
        rows = torch.ones_like(step) if self.rows is None else self.rows
        return values, step * rows, self.weight.left * rows[:, None], self.weight.right

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """What to add to the product in place of the linear's bias (O,): the effect of the shift is taken out."""
        if self.shift is None:
            return bias
        offset = self.weight.dense() @ (self.shift if self.smooth is None else self.shift / self.smooth)
        if self.rows is not None:
            offset = offset * self.rows
        return -offset if bias is None else bias - offset

    def divide_rows(self, rows: slice, factors: Tensor) -> "QuantizedLayer":
        """The same with these output channels divided by ``factors``."""
        every = torch.ones(len(self.weight.left), device=factors.device) if self.rows is None else self.rows.clone()
        every[rows] /= factors
        return replace(self, rows=every)
