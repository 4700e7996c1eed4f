"""What recipes collect while the trajectory is replayed, beside the grid search.

Observers are called with a linear's input (K, N, T, I) and output (K, N, T, O) for K steps at a
time (see ``quant.calibration.trajectory.replay``); their attributes hold what they collected.
"""
import torch
from torch import Tensor, nn

from quant.calibration.watch import Observer
from quant.numerics.tokens import matrix


class FirstSteps:
    """Shows another observer the first ``steps`` steps of the trajectory and hides the rest."""

    def __init__(self, observer: Observer, steps: int):
        self._observer = observer
        self._left = steps

    def __call__(self, x: Tensor, y: Tensor) -> None:
        if self._left > 0:
            self._observer(x[:self._left], y[:self._left])
        self._left -= len(x)


class SecondMoment:
    """Sums ``X^T X`` of a linear's inputs.

    Attributes:
        value: (I, I) float32, divided by the number of steps.
    """

    def __init__(self, module: nn.Module, steps: int):
        columns = matrix(module).shape[1]
        self.value = torch.zeros(columns, columns, device=module.weight.device)
        self._steps = steps

    def __call__(self, x: Tensor, y: Tensor) -> None:
        rows = x.flatten(0, 2)
        self.value.addmm_(rows.T, rows, alpha=1 / self._steps)


class Samples:
    """Keeps a linear's inputs for some images at some steps.

    Args:
        picks: (P, 2), steps and images, sorted.
        tokens: kept of every image, evenly spread; None for all.
    """

    def __init__(self, picks: Tensor, tokens: int | None = None):
        self._picks = picks
        self._tokens = tokens
        self._step = 0
        self._parts: list[Tensor] = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        steps = self._picks[:, 0]
        here = (steps >= self._step) & (steps < self._step + len(x))
        step, image = self._picks[here].T
        values = x[step - self._step, image]  # (p, T, I)
        if self._tokens is not None and self._tokens < values.shape[1]:
            spread = torch.arange(self._tokens, device=values.device)
            values = values[:, spread * values.shape[1] // self._tokens]
        self._parts.append(values)
        self._step += len(x)

    @property
    def value(self) -> Tensor:
        """The inputs in the order of the picks, (P, T, I)."""
        return torch.cat(self._parts)


class OperandSamples:
    """Keeps an attention's queries, keys and values for some images at some steps.

    Whole images, because tokens attend to each other.
    """

    def __init__(self, picks: Tensor):
        self._samples = Samples(picks), Samples(picks), Samples(picks)
        self.heads = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.heads = query.shape[2]
        for samples, operand in zip(self._samples, (query, key, value)):
            tokens = operand.transpose(2, 3).flatten(3)  # (K, N, T, D)
            samples(tokens, tokens)

    @property
    def is_empty(self) -> bool:
        """Whether the attention never multiplied."""
        return self.heads == 0

    @property
    def value(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in the order of the picks, heads side by side, (P, T, D)."""
        query, key, value = self._samples
        return query.value, key.value, value.value


class ImageMaxima:
    """Collects the largest magnitude of each input channel over an image's tokens."""

    def __init__(self):
        self._parts: list[Tensor] = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self._parts.append(x.abs().amax(2).flatten(0, 1))

    @property
    def value(self) -> Tensor:
        """Maxima of every image at every step, (steps * N, I)."""
        return torch.cat(self._parts)


class StepRange:
    """Collects the smallest and largest input at each step, over images and channels."""

    def __init__(self):
        self._parts: list[Tensor] = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self._parts.append(torch.stack(x.flatten(1).aminmax(dim=1)))

    @property
    def low(self) -> Tensor:
        """The smallest input of each step, (steps,)."""
        return torch.cat(self._parts, 1)[0]

    @property
    def high(self) -> Tensor:
        """The largest input of each step, (steps,)."""
        return torch.cat(self._parts, 1)[1]


# PTQ4DM's timesteps: mean and deviation of their normal distribution, as shares of the diffusion
# time (Shang et al., 2023, section 3.3).
NORMAL_MEAN = 0.4
NORMAL_DEVIATION = 0.4


def pick(steps: int, images: int, count: int, spread: str, seed: int = 0) -> Tensor:
    """Choose which image at which step a static quantiser is calibrated on, (count, 2), sorted.

    Args:
        steps: of the trajectory, 0 is the noisiest.
        images: at every step.
        count: pairs to draw.
        spread: ``uniform`` over the steps, or ``normal``: PTQ4DM's draws of the diffusion time
            (0 is the clean image), stretched to all of it, as its code does.
    """
    generator = torch.Generator().manual_seed(seed)
    if spread == "normal":
        time = NORMAL_MEAN + NORMAL_DEVIATION * torch.randn(count, generator=generator)
        time = (time - time.min()) / (time.max() - time.min()).clamp(min=1e-6)
        step = (steps - 1 - (time * steps).floor().clamp(0, steps - 1)).long()
    else:
        step = torch.arange(count) * steps // count
    image = torch.randint(images, (count,), generator=generator)
    return torch.stack([step, image], 1)[(step * images + image).argsort()]
