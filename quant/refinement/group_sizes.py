"""Which group sizes a layer can have, and which of them are allowed together (Q-DiT, 5.1)."""
from collections.abc import Callable, Iterable

SCALE_BITS = 32  # partial sums and scales are float32

Groups = dict[str, int]  # layer -> group size
Sizes = tuple[int, ...]  # a configuration without the names, in the order of the layers
Constraint = Callable[[Groups], bool]


def group_choices(widths: dict[str, int], sizes: Iterable[int]) -> dict[str, Sizes]:
    """List the sizes that divide each layer's input width, ascending; the width if none does."""
    choices = {}
    for name, width in widths.items():
        divisors = {size for size in sizes if width % size == 0}
        choices[name] = tuple(sorted(divisors)) or (width,)
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
    total = 0
    for name, (rows, columns) in shapes.items():
        on_codes = rows * columns * weight_bits * act_bits
        on_partial_sums = rows * (columns // groups[name]) * SCALE_BITS ** 2
        total += on_codes + on_partial_sums
    return total


def mean_at_least(minimum: float) -> Constraint:
    """Make the published code's stand-in for BitOps (there 128, with sizes from 32 to 288)."""
    def allowed(groups: Groups) -> bool:
        return mean_group_size(groups) >= minimum

    return allowed


def bit_ops_at_most(
    limit: int, shapes: dict[str, tuple[int, int]], weight_bits: int, act_bits: int
) -> Constraint:
    """Make equation 6's constraint, with ``bit_ops``."""
    def allowed(groups: Groups) -> bool:
        return bit_ops(groups, shapes, weight_bits, act_bits) <= limit

    return allowed
