"""What quantisation found for one linear, and what that means for a product with it."""
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.activations.quantisers import Activation
from quant.numerics.smoothing import NO_SMOOTHING, Smoothing
from quant.weights.low_rank import Approximation


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantised linear: ``W diag(smoothing.factors) ~ weight``.

    Attributes:
        weight: (O, I).
        act: how its input is quantised; None leaves it in floating point.
        smoothing: what happens to its input before that. The effect of a shift is taken out of the
            output again, by ``bias``.
        rows: (O,) float32 output scales, set when the smoothing of a later layer is folded into
            this one; None for ones.
        offset: (O,) float32, the effect of the shift; None: what it adds to the product with
            ``weight``.
        folded: the smoothing that the layers before apply already: the input arrives as
            ``(x + shift) / factors``. ``fold`` moves ``smoothing`` here. No product reads it, but
            an adapter beside the layer needs the input as it was.
    """

    weight: Approximation
    act: Activation | None
    smoothing: Smoothing = NO_SMOOTHING
    rows: Tensor | None = None
    offset: Tensor | None = None
    folded: Smoothing = NO_SMOOTHING

    def factored(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Split the weight into ``diag(step) V + L R``.

        Returns:
            V (O, I), step (O,), L (O, r) and R (r, I). V holds integers where the layout allows it;
            elsewhere it is the whole weight, step is None and the rank 0.
        """
        integers = self.weight.base.integers()
        if integers is None:
            dense = self.weight.dense()
            left, right = dense.new_zeros(len(dense), 0), dense.new_zeros(0, dense.shape[1])
            return self._scale_rows(dense), None, left, right
        values, step = integers
        rows = torch.ones_like(step) if self.rows is None else self.rows
        return values, step * rows, self.weight.left * rows[:, None], self.weight.right

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """Compute what to add to the product, (O,), from the linear's own bias.

        The shift's effect on the product is taken out.
        """
        shift, factors = self.smoothing.shift, self.smoothing.factors
        if shift is None:
            return bias
        offset = self.offset
        if offset is None:
            offset = self.weight.dense() @ (shift if factors is None else shift / factors)
        if self.rows is not None:
            offset = offset * self.rows
        return -offset if bias is None else bias - offset

    def divide_rows(self, rows: slice, factors: Tensor) -> "QuantizedLayer":
        """Return the layer with these output channels divided by ``factors``."""
        if self.rows is None:
            scales = torch.ones(len(self.weight.left), device=factors.device)
        else:
            scales = self.rows.clone()
        scales[rows] /= factors
        return replace(self, rows=scales)

    def _scale_rows(self, dense: Tensor) -> Tensor:
        return dense if self.rows is None else dense * self.rows[:, None]
