"""How widely activations are spread, over steps, blocks and images (Q-DiT, section 3)."""
from collections.abc import Iterable

import torch
from torch import Tensor

# What a box shows: its ends and its whiskers, the middle, and the outermost values.
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


def image_quantiles(x: Tensor) -> Tensor:
    """Compute ``QUANTILES`` of every image's values (N, ...), (N, 7).

    Each is the value at the nearest rank. ``torch.quantile`` refuses as many as a wide layer has.
    """
    values = x.flatten(1).sort(1).values
    ranks = torch.tensor(QUANTILES, device=x.device) * (values.shape[1] - 1)
    return values[:, ranks.round().long()]


class Spreads:
    """Collects how the inputs of linears are spread while a model samples.

    Args:
        wanted: linears whose quantiles are kept, too.

    Give ``see`` to ``architectures.hooked.hooked``.
    """

    def __init__(self, wanted: Iterable[str]):
        self._wanted = frozenset(wanted)
        self._deviations: dict[str, list[Tensor]] = {}
        self._quantiles: dict[str, list[Tensor]] = {}

    def see(self, name: str, x: Tensor, _: Tensor) -> None:
        """Look at a linear's input (N, ...) at one step."""
        self._deviations.setdefault(name, []).append(x.flatten(1).std(1).cpu())
        if name in self._wanted:
            self._quantiles.setdefault(name, []).append(image_quantiles(x[:1])[0].cpu())

    @property
    def deviations(self) -> dict[str, Tensor]:
        """Standard deviations of every image's values, (steps, N) of every linear."""
        return {name: torch.stack(values) for name, values in self._deviations.items()}

    @property
    def quantiles(self) -> dict[str, Tensor]:
        """``QUANTILES`` of the first image's values, (steps, 7) of the wanted linears."""
        return {name: torch.stack(values) for name, values in self._quantiles.items()}
