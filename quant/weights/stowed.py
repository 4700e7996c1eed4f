"""A weight with its low-rank branch as a file holds it."""
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.numerics.floating import FloatWeight
from quant.numerics.stowed import Stowed, stow
from quant.weights.low_rank import Approximation


@dataclass(frozen=True)
class StowedWeight(Approximation):
    """An approximation that is small, on the CPU, and unpacked when it is read.

    Attributes:
        base: the quantised part, or at 16 bits all of it.
        lefts, rights: the branch. Where ``LowRankWeight.integer_branch`` made whole numbers of R
            they are bfloat16 and int8; float32 in the published order.
        device: where what is read lies.
    """

    base: Stowed | FloatWeight
    lefts: Tensor
    rights: Tensor
    device: torch.device = torch.device("cpu")

    @property
    def left(self) -> Tensor:
        """Return L (O, r), float32."""
        return self.lefts.to(self.device, torch.float32)

    @property
    def right(self) -> Tensor:
        """Return R (r, I), float32."""
        return self.rights.to(self.device, torch.float32)


def stow_weight(weight: Approximation) -> StowedWeight:
    """Pack a weight and its branch as a file holds them."""
    base = weight.base if isinstance(weight.base, FloatWeight) else stow(weight.base)
    left, right = weight.left, weight.right
    is_integer = torch.equal(right, right.round())
    kinds = (torch.bfloat16, torch.int8) if is_integer else (torch.float32, torch.float32)
    lefts, rights = (part.to("cpu", kind) for part, kind in zip((left, right), kinds))
    return StowedWeight(base, lefts, rights, left.device)
