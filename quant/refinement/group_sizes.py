"""Which group sizes a layer can have, and which of them are allowed together (Q-DiT, 5.1)."""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SCALE_BITS = 32  # partial sums and scales are float32

Groups = dict[str, int]  # layer -> group size
Sizes = tuple[int, ...]  # a configuration without the names, in the order of the layers

# Room for rounding errors in a sum of prices.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Constraint:
    """Allows configurations whose prices, summed over the layers, keep to a limit.

    A sum, so that an integer program can hold it.

    Attributes:
        price: of a layer, by its name, at a group size.
        limit: what the prices may sum to.
    """

    price: Callable[[str, int], float]
    limit: float

    def __call__(self, groups: Groups) -> bool:
        total = sum(self.price(name, size) for name, size in groups.items())
        return total <= self.limit + TOLERANCE


def group_choices(
    widths: dict[str, int], sizes: Iterable[int], tail: bool = False
) -> dict[str, Sizes]:
    """List the sizes that each layer can have, ascending.

    They are those that divide its input width, the width itself if none does. With a ``tail``, a
    shorter last group, they are all; what exceeds the width means the width.
    """
    choices = {}
    for name, width in widths.items():
        fitting = {min(size, width) for size in sizes if tail or width % size == 0}
        choices[name] = tuple(sorted(fitting)) or (width,)
    return choices


def largest_up_to(limit: float, sizes: Sizes) -> int:
    """Take the largest size that does not exceed a limit, or the least of all if none does."""
    return max((size for size in sizes if size <= limit), default=min(sizes))


def mean_group_size(groups: Groups) -> float:
    """Average over layers, each counted once (what the published code constrains)."""
    return sum(groups.values()) / len(groups)


def bit_ops(
    groups: Groups, shapes: dict[str, tuple[int, int]], weight_bits: int, act_bits: int
) -> int:
    """Count bit operations per token of layers with weights (O, I), B(g) of equation 6.

    ``sum of O I weight_bits act_bits + O (I / g) 32^2``: the multiply-accumulates on codes and, per
    output and group, one in float32 that scales the group's partial sum and adds it.

    The paper names BitOps and no formula. The second term, without which group sizes would cost
    nothing, is ours. Zero points are left out.
    """
    return sum(layer_bit_ops(shape, groups[name], weight_bits, act_bits)
               for name, shape in shapes.items())


def layer_bit_ops(shape: tuple[int, int], group: int, weight_bits: int, act_bits: int) -> int:
    """Count the bit operations of one layer, its term of ``bit_ops``."""
    rows, columns = shape
    on_codes = rows * columns * weight_bits * act_bits
    on_partial_sums = rows * math.ceil(columns / group) * SCALE_BITS ** 2
    return on_codes + on_partial_sums


def mean_at_least(minimum: float) -> Constraint:
    """Make the published code's stand-in for BitOps (there 128, with sizes from 32 to 288)."""
    return Constraint(lambda _, size: minimum - size, 0.0)


def bit_ops_at_most(
    limit: int, shapes: dict[str, tuple[int, int]], weight_bits: int, act_bits: int
) -> Constraint:
    """Make equation 6's constraint, with ``bit_ops``."""
    def price(name: str, size: int) -> int:
        return layer_bit_ops(shapes[name], size, weight_bits, act_bits)

    return Constraint(price, limit)
