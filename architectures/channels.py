"""Which factor divides which element of a tensor, carried back through operations that move them.

An operation that only moves elements is inverted by letting it move their numbers.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

UNTOUCHED = -1


class Obstacle(Exception):
    """Says in a few words why a factor cannot go further back."""


@dataclass(frozen=True)
class Demand:
    """What a tensor v has to become: ``(v + plus) / s[factor] - plus``.

    Attributes:
        factor: number of every element's factor; ``UNTOUCHED`` where it does not matter or stays.
        plus: what the element is a distance from: 1 for the scale of ``1 + scale``, else 0.
    """

    factor: Tensor
    plus: Tensor

    @property
    def has_plus(self) -> bool:
        return bool(self.plus.any())

    def without_plus(self) -> "Demand":
        return replace(self, plus=torch.zeros_like(self.plus))

    def add_to_plus(self, number: float) -> "Demand":
        return replace(self, plus=self.plus + number)

    def scale_plus(self, number: float) -> "Demand":
        return replace(self, plus=self.plus * number)

    def narrow(self, dim: int, start: int, size: int) -> "Demand":
        return self.moved(lambda tensor: tensor.narrow(dim, start, size))

    def select(self, dim: int, number: int) -> "Demand":
        return self.moved(lambda tensor: tensor.select(dim, number))

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Demand":
        return Demand(move(self.factor), move(self.plus))


def last_channels(shape: torch.Size) -> Demand:
    """Demand a factor for every channel, the last dimension."""
    factor = torch.arange(shape[-1]).expand(shape)
    return Demand(factor, torch.zeros(shape))


def is_last_channels(demand: Demand) -> bool:
    """Tell whether channels, the last dimension, have their own factors in order."""
    channels = torch.arange(demand.factor.shape[-1])
    fits = (demand.factor == channels) | (demand.factor == UNTOUCHED)
    return bool(fits.all() and (demand.factor != UNTOUCHED).any())


def before(
    demand: Demand, move: Callable[[Tensor], Tensor], shape: torch.Size, reason: str
) -> Demand:
    """Return the demand on a tensor (shape) that ``move`` turns into the demanded one.

    Args:
        move: takes the numbers of elements and moves them; -1 marks what it makes up.
        reason: of the obstacle.

    Raises:
        Obstacle: an element would need two factors, or one that is made up needs any.
    """
    count = torch.Size(shape).numel()
    sources = move(torch.arange(count).reshape(shape)).flatten()
    factors, plus = demand.factor.flatten(), demand.plus.flatten()
    touched = factors != UNTOUCHED
    sources, factors, plus = sources[touched], factors[touched], plus[touched]
    if (sources < 0).any():
        raise Obstacle(reason)
    before_factor = torch.full((count,), UNTOUCHED)
    before_plus = torch.zeros(count)
    before_factor[sources], before_plus[sources] = factors, plus
    same = (before_factor[sources] == factors) & (before_plus[sources] == plus)
    if not same.all():
        raise Obstacle(reason)
    return Demand(before_factor.reshape(shape), before_plus.reshape(shape))


def before_broadcast(demand: Demand, shape: torch.Size, reason: str) -> Demand:
    """Return the demand on a tensor that is broadcast to the demanded one's shape."""
    return before(demand, lambda numbers: numbers.expand(demand.factor.shape), shape, reason)


def apply(demand: Demand, value: Tensor, factors: Tensor) -> Tensor:
    """Give a tensor what is demanded of it, with the factors (D,)."""
    touched = demand.factor != UNTOUCHED
    divisor = torch.where(touched, factors[demand.factor.clamp(min=0)], 1.0)
    return ((value + demand.plus) / divisor - demand.plus).to(value.dtype)
