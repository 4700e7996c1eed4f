"""Where the layers that a report shows stand in their model."""
from collections.abc import Mapping
from typing import Protocol, TypeVar

Value = TypeVar("Value")


class Place(Protocol):
    """What a figure has to know of a layer's place; ``architectures.sites.Site`` says it.

    Attributes:
        role: what figures call the layer, such as ``qkv``; the same in every block.
        block: the name of its block, None outside the blocks.
    """

    @property
    def role(self) -> str: ...

    @property
    def block(self) -> str | None: ...


def blocks_of(names: Mapping[str, Value], places: Mapping[str, Place]) -> list[str]:
    """List the blocks in which layers stand, in the order of the layers."""
    blocks = dict.fromkeys(places[name].block for name in names)
    return [block for block in blocks if block is not None]


def by_role(
    values: Mapping[str, Value],
    places: Mapping[str, Place],
) -> dict[str, dict[str, Value]]:
    """Sort the values of layers by role, then by block; those outside the blocks are left out."""
    table = {}
    for name, value in values.items():
        place = places[name]
        if place.block is not None:
            table.setdefault(place.role, {})[place.block] = value
    return table
