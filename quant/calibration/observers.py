"""What recipes collect while the calibration trajectory is replayed (see ``quant.calibration.trajectory.replay``), beside the grid search."""
import torch
from torch import Tensor

from quant.numerics.tokens import matrix


class SecondMoment:
    """``X^T X`` of a layer's inputs; attribute ``value`` (I, I) float32, divided by the number of timesteps."""

    def __init__(self, module: torch.nn.Module, steps: int):
        columns = matrix(module).shape[1]
        self.value = torch.zeros(columns, columns, device=module.weight.device)
        self._steps = steps

    def __call__(self, x: Tensor, y: Tensor) -> None:
        rows = x.flatten(0, 2)
        self.value.addmm_(rows.T, rows, alpha=1 / self._steps)


class Samples:
    """What a layer sees of some images at some steps; attribute ``value`` (P, T, I), in order.

    Args:
        picks: (P, 2), step and image, sorted.
        tokens: of every image, evenly spread; None for all.
        of_output: its outputs instead, (P, T, O).
    """

    def __init__(self, picks: Tensor, tokens: int | None = None, of_output: bool = False):
        self._picks, self._tokens, self._of_output, self._step, self._parts = picks, tokens, of_output, 0, []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        step, image = self._picks[(self._picks[:, 0] >= self._step) & (self._picks[:, 0] < self._step + len(x))].T
        values = (y if self._of_output else x)[step - self._step, image]
        if self._tokens is not None and self._tokens < values.shape[1]:
            values = values[:, torch.arange(self._tokens, device=values.device) * values.shape[1] // self._tokens]
        self._parts.append(values)
        self._step += len(x)

    @property
    def value(self) -> Tensor:
        return torch.cat(self._parts)


class ImageMaxima:
    """Largest magnitude of each input channel over an image's tokens; attribute ``value`` (steps * 2N, I)."""

    def __init__(self):
        self._parts = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self._parts.append(x.abs().amax(2).flatten(0, 1))

    @property
    def value(self) -> Tensor:
        return torch.cat(self._parts)


class StepRange:
    """Smallest and largest input at each step, over images and channels; attributes ``low``, ``high`` (steps,)."""

    def __init__(self):
        self._parts = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self._parts.append(torch.stack(x.flatten(1).aminmax(dim=1)))

    @property
    def low(self) -> Tensor:
        return torch.cat(self._parts, 1)[0]

    @property
    def high(self) -> Tensor:
        return torch.cat(self._parts, 1)[1]


def pick(steps: int, images: int, count: int, spread: str, seed: int = 0) -> Tensor:
    """Which image at which step a static quantiser is calibrated on: (count, 2), sorted.

    Args:
        spread: ``uniform`` over the steps, or ``normal``: PTQ4DM's timesteps (Shang et al., 2023, section 3.3), drawn from a normal
            distribution with its mean and deviation at 0.4 of the diffusion time (0 is the clean image), then stretched to all of it, as its code does.
    """
    generator = torch.Generator().manual_seed(seed)
    if spread == "normal":
        time = 0.4 + 0.4 * torch.randn(count, generator=generator)
        time = (time - time.min()) / (time.max() - time.min()).clamp(min=1e-6)
        step = (steps - 1 - (time * steps).floor().clamp(0, steps - 1)).long()
    else:
        step = torch.arange(count) * steps // count
    image = torch.randint(images, (count,), generator=generator)
    return torch.stack([step, image], 1)[(step * images + image).argsort()]
