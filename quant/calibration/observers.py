"""What recipes collect while the trajectory is replayed, beside the grid search.

Observers are called with a linear's input (K, N, T, I) and output (K, N, T, O) for K steps at a
time (see ``quant.calibration.trajectory.replay``); their attributes hold what they collected.
"""
import torch
from torch import Tensor

from quant.activations.attention import attention_probabilities, by_head
from quant.calibration.watch import Observer


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
        value: (I, I) float32, divided by the number of steps; None before the first inputs.
    """

    def __init__(self, steps: int):
        self.value: Tensor | None = None
        self._steps = steps

    def __call__(self, x: Tensor, y: Tensor) -> None:
        rows = x.flatten(0, 2)
        if self.value is None:
            self.value = rows.new_zeros(rows.shape[1], rows.shape[1])
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
    def value(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the products multiply, in the order of the picks.

        Queries, keys and values have their heads side by side, (P, T, D); probabilities are
        (P, heads, T, T).
        """
        query, key, value = (samples.value for samples in self._samples)
        probabilities = attention_probabilities(
            by_head(query, self.heads), by_head(key, self.heads))
        return query, key, value, probabilities


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


class StepSamples:
    """Keeps some tokens of a linear's input at every step, drawn from all images.

    Args:
        tokens: kept of every step, all if there are fewer.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._parts: list[Tensor] = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        rows = x.flatten(1, 2)  # (K, N T, I)
        self._parts.append(rows[:, _draw(rows.shape[1], self._tokens).to(rows.device)])

    @property
    def value(self) -> Tensor:
        """The tokens of every step, (steps, tokens, I)."""
        return torch.cat(self._parts)


class StepOperandSamples:
    """Keeps some of an attention's queries, keys, values and probabilities at every step.

    Args:
        tokens: kept of every step, as in ``StepSamples``. A query token brings its probabilities
            for all keys of its image.
    """

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._samples = StepSamples(tokens), StepSamples(tokens), StepSamples(tokens)
        self._probabilities: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for samples, operand in zip(self._samples, (query, key, value)):
            tokens = operand.transpose(2, 3).flatten(3)  # (K, N, T, D)
            samples(tokens, tokens)
        _, images, _, length, _ = query.shape
        drawn = _draw(images * length, self._tokens).to(query.device)
        image, token = drawn // length, drawn % length
        rows = query[:, image, :, token].movedim(0, 1).unsqueeze(-2)  # (K, p, heads, 1, d)
        self._probabilities.append(attention_probabilities(rows, key[:, image]).flatten(1))

    @property
    def is_empty(self) -> bool:
        """Whether the attention never multiplied."""
        return not self._probabilities

    @property
    def value(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (steps, tokens, D), and probabilities (steps, values)."""
        query, key, value = self._samples
        return query.value, key.value, value.value, torch.cat(self._probabilities)


def _draw(count: int, wanted: int) -> Tensor:
    """Draw some of ``count`` places, or all of them; always the same ones, in order."""
    if count <= wanted:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


# PTQ4DM's timesteps: mean and deviation of their normal distribution, as shares of the diffusion
# time (Shang et al., 2023, section 3.3, and the commands of its code).
NORMAL_MEAN = 0.4
NORMAL_DEVIATION = 0.4


def pick(steps: int, images: int, count: int, spread: str, seed: int = 0) -> Tensor:
    """Choose which image at which step a static quantiser is calibrated on, (count, 2), sorted.

    Args:
        steps: of the trajectory, 0 is the noisiest.
        images: at every step.
        count: pairs to draw.
        spread: ``uniform`` over the steps, or ``normal``: PTQ4DM's draws of the diffusion time (0
            is the clean image). As in its code they are truncated to a step, and those beyond an
            end count as the end.
    """
    generator = torch.Generator().manual_seed(seed)
    if spread == "normal":
        time = NORMAL_MEAN + NORMAL_DEVIATION * torch.randn(count, generator=generator)
        step = steps - 1 - (time * steps).trunc().clamp(0, steps - 1).long()
    else:
        step = torch.arange(count) * steps // count
    image = torch.randint(images, (count,), generator=generator)
    return torch.stack([step, image], 1)[(step * images + image).argsort()]
