"""The calibration trajectory, and the observers that ride on it (DiTAS, section 4.1).

The data is the model's own sampling. While it samples once, the first pass keeps the arguments of
every call of the model, which are small, and the largest magnitudes of every site's input. The
second pass makes these calls again, several at a time. Observers that need the maxima first, such
as the grid search, see every input once, as it passes by.

A step is one call of the model; step 0 is the noisiest.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from architectures.hooked import hooked
from architectures.registry import architecture_of
from architectures.sites import Call, Site, timesteps_of
from quant.activations.attention import intercepted_attention
from quant.calibration.calls import batch_size, can_stack, recorded_calls, stack, take
from quant.calibration.step_maxima import StepMaxima
from quant.calibration.watch import Watch
from quant.numerics.tokens import as_tokens, matrix_shape, output_tokens

# Lets a model sample once.
Drive = Callable[[nn.Module], None]
# Gives the float weight (O, I) of a linear, by its name, where it can be computed with.
WeightOf = Callable[[str], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """The calls of a sampling run.

    Attributes:
        calls: noisiest first.
        batched: the arguments with an entry per image.
        timesteps: (steps,), what the first image of each call was called with.
        tokens: rows of the largest activation in a call, over all images.
    """

    calls: tuple[Call, ...]
    batched: tuple[str, ...]
    timesteps: Tensor
    tokens: int

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def images(self) -> int:
        """Images in every call, in the smallest one; with guidance each one counts twice."""
        return min(batch_size(call, self.batched) for call in self.calls)

    def take(self, picks: Tensor) -> Call:
        """Make a call of single images; ``picks`` (P, 2) are their steps and numbers there."""
        return take(self.calls, picks, self.batched)

    def at(self, step: int) -> "Trajectory":
        """Cut out a single step."""
        return Trajectory(
            self.calls[step:step + 1], self.batched, self.timesteps[step:step + 1], self.tokens)


@torch.inference_mode()
def record(
    model: nn.Module, sites: Sequence[Site], drive: Drive
) -> tuple[Trajectory, dict[str, Tensor]]:
    """Let ``drive`` sample once; keep every call of the model, and the maxima of each site's input.

    Returns:
        The trajectory and, per site, ``max |input_j|`` over images and tokens at every step,
        (steps, I) float32.

    Raises:
        ValueError: an input was not finite, the model was not called, or it did not run a site in
            every call.
    """
    architecture = architecture_of(model)
    readers = {site.linears[0]: site.name for site in sites}
    widths = {site.name: matrix_shape(model.get_submodule(site.linears[0]))[1] for site in sites}
    maxima = StepMaxima(widths)
    rows = [0]

    with recorded_calls(model) as calls:

        def see(name, inputs, _):
            tokens = as_tokens(model.get_submodule(name), inputs).flatten(0, 1)
            rows.append(len(tokens))
            maxima.see(len(calls) - 1, readers[name], tokens)

        with hooked(model, list(readers), see):
            drive(model)
    if not calls:
        raise ValueError("the calibration run never called the model")
    absmax = maxima.by_site(len(calls))
    _check_finite(absmax)
    timesteps = torch.stack([timesteps_of(call, architecture.clock)[0] for call in calls])
    return Trajectory(tuple(calls), architecture.batched, timesteps, max(rows)), absmax


def _check_finite(absmax: dict[str, Tensor]) -> None:
    """Name the first input, in the order of sampling, that holds NaN or infinity."""
    bad = {name: ~torch.isfinite(values).all(1) for name, values in absmax.items()}  # (steps,) each
    firsts = [(int(steps.nonzero()[0]), i, name)
              for i, (name, steps) in enumerate(bad.items()) if steps.any()]
    if firsts:
        step, _, name = min(firsts)
        raise ValueError(f"the input of {name} is not finite at step {step} of the calibration "
                         "trajectory: the weights are damaged")


@torch.inference_mode()
def replay(
    model: nn.Module, trajectory: Trajectory, watch: Watch, tokens: int, desc: str
) -> None:
    """Make the recorded calls once more, and show every observer what it asked for.

    Observers of a linear get its input (K, N, T, I) and output (K, N, T, O) for K steps at a time.
    K is as many as fit ``tokens`` tokens, at least one, and one where calls differ in shape. Of a
    linear that runs several times in a call they see the first. ``desc`` names the progress bar.
    """
    architecture = architecture_of(model)
    attentions = [site.name for site in architecture.attentions(model)]
    linears = [name for name in watch.modules if name not in attentions]
    together = max(1, tokens // trajectory.tokens)
    together = together if can_stack(trajectory.calls, trajectory.batched) else 1
    watched = [name for name in attentions if watch.of(name)]
    with tqdm(total=len(trajectory), desc=desc, unit="step") as bar:
        for start in range(0, len(trajectory), together):
            calls = trajectory.calls[start:start + together]
            show = _Show(model, watch, len(calls))
            with (hooked(model, linears, show.linear),
                  intercepted_attention(model, watched, show.attention)):
                model(**stack(calls, trajectory.batched))
            bar.update(len(calls))


class _Show:
    """Shows observers what modules see while the calls of K steps run as one."""

    def __init__(self, model: nn.Module, watch: Watch, steps: int):
        self._model = model
        self._watch = watch
        self._steps = steps
        self._shown: set[str] = set()

    def linear(self, name: str, inputs: Tensor, output: Tensor) -> None:
        if name in self._shown:
            return
        self._shown.add(name)
        module = self._model.get_submodule(name)
        inputs = as_tokens(module, inputs).unflatten(0, (self._steps, -1))
        output = output_tokens(module, output).unflatten(0, (self._steps, -1))
        for observer in self._watch.of(name):
            observer(inputs, output)

    def attention(self, name: str, *operands: Tensor) -> None:
        operands = [operand.unflatten(0, (self._steps, -1)) for operand in operands]
        for observer in self._watch.of(name):
            observer(*operands)


def joint_weight(site: Site, weight_of: WeightOf) -> Tensor:
    """Stack the weights of a site's linears, (O, I); that of a single one is not copied."""
    weights = [weight_of(name) for name in site.linears]
    return weights[0] if len(weights) == 1 else torch.cat(weights)
