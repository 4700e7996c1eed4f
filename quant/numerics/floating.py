"""Values that stay in floating point, as float16 can hold them."""
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.numerics.spec import OFF_BITS, QuantSpec


@dataclass(frozen=True)
class FloatWeight:
    """A weight of 16 bits, where others have a ``quant.numerics.uniform.Coded``.

    Attributes:
        values: (O, I) float32; in a file float16, unless that overflows.
    """

    values: Tensor

    @property
    def spec(self) -> QuantSpec:
        """Say that nothing is quantised."""
        return QuantSpec(OFF_BITS, "tensor")

    def integers(self) -> None:
        """Return None: there are no integers."""
        return None

    def dequantize(self) -> Tensor:
        """Return the values, (O, I) float32."""
        return self.values


def half_unless_overflow(value: Tensor) -> Tensor:
    """Round to float16, unless a value overflows."""
    half = value.half()
    return half if torch.isfinite(half).all() else value
