"""The largest magnitudes of every site's input, step by step."""
import torch
from torch import Tensor

# Of a channel that was not seen. Magnitudes are never negative.
UNSEEN = -1.0


class StepMaxima:
    """Collects the largest magnitude of every input channel of each site, at every step.

    Those of a step lie in one tensor, made when it begins. Small tensors made while large
    activations come and go would keep the memory of these apart: 4 GB more for DiT-XL/2.

    Args:
        widths: input channels of each site.
    """

    def __init__(self, widths: dict[str, int]):
        self._widths = widths
        self._steps: list[dict[str, Tensor]] = []

    def see(self, step: int, name: str, tokens: Tensor) -> None:
        """Look at inputs (n, I) of a site."""
        self._begin_until(step, tokens.device)
        largest = self._steps[step][name]
        # As exact as the maximum of magnitudes, without their copy: 66 ms in place of 191 for
        # 8192 x 4608 on one thread.
        magnitude = torch.maximum(tokens.amax(0), -tokens.amin(0))
        torch.maximum(largest, magnitude, out=largest)

    def by_site(self, steps: int) -> dict[str, Tensor]:
        """Return the maxima of each site, (steps, I) float32.

        Raises:
            ValueError: a site had no input at some step.
        """
        self._begin_until(steps - 1, self._device)
        maxima = {name: torch.stack([values[name] for values in self._steps])
                  for name in self._widths}
        for name, values in maxima.items():
            seen = int((values[:, 0] != UNSEEN).sum())
            if seen != steps:
                raise ValueError(f"{name} ran in {seen} of the {steps} calls of the calibration "
                                 "run: expected it to run in every one")
        return maxima

    @property
    def _device(self) -> torch.device:
        """Where the inputs of the first step were; the CPU if there was none."""
        first = next(iter(self._steps[0].values()), None) if self._steps else None
        return torch.device("cpu") if first is None else first.device

    def _begin_until(self, step: int, device: torch.device) -> None:
        widths = list(self._widths.values())
        while len(self._steps) <= step:
            parts = torch.full((sum(widths),), UNSEEN, device=device).split(widths)
            self._steps.append(dict(zip(self._widths, parts)))
