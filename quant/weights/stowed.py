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
        stored_left, stored_right: the branch, bfloat16 and int8 where that is exact, as
            ``LowRankWeight.integer_branch`` makes it; float32 in the published order.
        device: where what is read lies.
    """

    base: Stowed | FloatWeight
    stored_left: Tensor
    stored_right: Tensor
    device: torch.device = torch.device("cpu")

    @property
    def left(self) -> Tensor:
        """Return L (O, r), float32."""
        return self.stored_left.to(self.device, torch.float32)

    @property
    def right(self) -> Tensor:
        """Return R (r, I), float32."""
        return self.stored_right.to(self.device, torch.float32)


def stow_weight(weight: Approximation) -> StowedWeight:
    """Pack a weight and its branch as a file holds them."""
    base = weight.base if isinstance(weight.base, FloatWeight) else stow(weight.base)
    left, right = weight.left.cpu(), weight.right.cpu()
    small_left, small_right = left.bfloat16(), right.to(torch.int8)
    is_exact = torch.equal(small_left.float(), left) and torch.equal(small_right.float(), right)
    branch = (small_left, small_right) if is_exact else (left, right)
    return StowedWeight(base, *branch, weight.left.device)
