"""Which group sizes a layer can have, and which of them are allowed together (Q-DiT, section 5.1)."""
from collections.abc import Callable, Iterable

SCALE_BITS = 32  # partial sums and scales are float32


Groups = dict[str, int]  # layer -> group size


Constraint = Callable[[Groups], bool]


Sizes = tuple[int, ...]  # a configuration without the names, in the order of the layers


def group_choices(widths: dict[str, int], sizes: Iterable[int]) -> dict[str, Sizes]:
    """The group sizes that divide each layer's input width, ascending; the width itself where none does."""
    return {name: tuple(sorted({size for size in sizes if width % size == 0})) or (width,) for name, width in widths.items()}


def mean_group_size(groups: Groups) -> float:
    """Over layers, each counted once (what the published code constrains)."""
    return sum(groups.values()) / len(groups)


def bit_ops(groups: Groups, shapes: dict[str, tuple[int, int]], weight_bits: int, act_bits: int) -> int:
    """Bit operations per token of layers with weights (O, I), B(g) of equation 6.

    ``sum of O I weight_bits act_bits + O (I / g) 32^2``: the multiply-accumulates on codes and, per output and group, one in float32
    that scales the group's partial sum and adds it. The paper names BitOps and no formula: the second term, without which group
    sizes would cost nothing, is ours. Zero points are left out.
    """
    return sum(rows * columns * weight_bits * act_bits + rows * (columns // groups[name]) * SCALE_BITS ** 2
               for name, (rows, columns) in shapes.items())


def mean_at_least(minimum: float) -> Constraint:
    """The published code's stand-in for BitOps (there 128, with sizes from 32 to 288)."""
    return lambda groups: mean_group_size(groups) >= minimum


def bit_ops_at_most(limit: int, shapes: dict[str, tuple[int, int]], weight_bits: int, act_bits: int) -> Constraint:
    """Equation 6's constraint, with ``bit_ops``."""
    return lambda groups: bit_ops(groups, shapes, weight_bits, act_bits) <= limit
