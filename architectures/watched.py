"""Sites of a model whose call cannot be recorded as a graph: what its linears are seen to read.

No fold can be proved then, so that every linear divides its own input.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from architectures.discover import Discovery, joined
from architectures.sites import Call, Site
from architectures.tracing import images_of

REASON = "not traced"


@dataclass(frozen=True)
class Reading:
    """A linear that ran.

    Attributes:
        version: of the tensor that it read, which changes with its values.
    """

    name: str
    read: Tensor
    version: int

    def is_same(self, other: "Reading") -> bool:
        """Tell whether both read one activation."""
        return self.read is other.read and self.version == other.version


@torch.no_grad()
def watch(model: nn.Module, call: Call, blocks: list[str]) -> Discovery:
    """Find the sites of a model while it runs; nothing folds.

    Args:
        call: arguments of its ``forward``.
        blocks: names of its blocks.
    """
    readings: dict[str, Reading] = {}

    def note(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            readings.setdefault(name, Reading(name, args[0], args[0]._version))

        return hook

    handles = [module.register_forward_pre_hook(note(name))
               for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        model(**call)
    finally:
        for handle in handles:
            handle.remove()
    sites = tuple(_sites(list(readings.values()), blocks, images_of(call)))
    reasons = {site.name: REASON for site in sites if site.is_balanced}
    return Discovery(tuple(blocks), sites, reasons)


def _sites(readings: list[Reading], blocks: list[str], images: int) -> Iterator[Site]:
    """Put linears of one block that read one activation into a site."""
    left = list(readings)
    while left:
        first = left[0]
        block = _block_of(first, blocks)
        same = [reading for reading in left
                if reading.is_same(first) and _block_of(reading, blocks) == block]
        left = [reading for reading in left if reading not in same]
        names = tuple(reading.name for reading in same)
        per_image = first.read.numel() == images * first.read.shape[-1]
        yield Site(joined(names), names, _role(block, per_image), block, (), per_image)


def _role(block: str | None, per_image: bool) -> str:
    if block is None:
        return "vector" if per_image else "outside"
    return "modulation" if per_image else "block"


def _block_of(reading: Reading, blocks: list[str]) -> str | None:
    return next((block for block in blocks if reading.name.startswith(f"{block}.")), None)
