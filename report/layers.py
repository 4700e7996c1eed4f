"""What quantisation does to each layer, observed on a short trajectory of the float model."""
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from architectures.hooked import hooked
from architectures.registry import architecture_of
from architectures.sites import Site
from quant.calibration.trajectory import Drive, record, replay
from quant.calibration.watch import Observer, Watch
from quant.install import find_timestep_index
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from report.spreads import Spreads, image_quantiles

IMAGES = 4  # in the trajectory that a report looks at
DEFAULT_ROLES = ("fc2", "qkv")


@dataclass(frozen=True)
class Observed:
    """What was seen of every quantised linear, by name.

    Attributes:
        absmax: (steps, I), largest magnitude of each input channel at each step.
        error_db: SQNR of the layer's output on the float model's inputs at the first, middle and
            last step.
        deviations: (steps, N) standard deviations of every image's input.
        watched: the steps (indices in sampling order) behind ``error_db``.
        places: the layer's role and block.
        shown: of the layers asked for, more.
    """

    absmax: dict[str, Tensor]
    error_db: dict[str, float]
    deviations: dict[str, Tensor]
    watched: list[int]
    places: Mapping[str, Site]
    shown: dict[str, "ShownLayer"]

    @property
    def steps(self) -> int:
        return len(next(iter(self.absmax.values())))

    @property
    def middle(self) -> int:
        return self.steps // 2


@dataclass(frozen=True)
class ShownLayer:
    """What figures show of one linear.

    Attributes:
        weight: (O, I) magnitudes.
        inputs: (T, I) magnitudes of the first image's input at the middle step.
        step_quantiles: (steps, 7) ``report.spreads.QUANTILES`` of the first image's input.
        image_quantiles: (N, 7) those of every image's input at the middle step.
    """

    weight: Tensor
    inputs: Tensor
    step_quantiles: Tensor
    image_quantiles: Tensor


def places_of(model: nn.Module) -> dict[str, Site]:
    """Find the site of every linear inside the blocks, by the linear's name."""
    sites = architecture_of(model).sites(model, "blocks")
    return {name: site for site in sites for name in site.linears}


def default_layers(places: Mapping[str, Site]) -> list[str]:
    """Choose the last fc2 and the last qkv.

    The paper shows outliers in fc2 (appendix, figures 1 to 4).
    """
    chosen = []
    for role in DEFAULT_ROLES:
        names = [name for name, place in places.items() if place.role == role]
        chosen.append(names[-1])
    return chosen


class OutputErrors:
    """The error of every quantised layer's output, given the float model's inputs.

    Give ``observer(name)`` to ``replay``, once or several times, then ask for ``decibels``.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], layers: dict[str, QuantizedLayer]):
        self._linears = linears
        self._layers = layers
        self._timestep_index = find_timestep_index(layers, {})
        # Of the output without its bias, and of its error.
        self._squared_sums = {name: torch.zeros(2, dtype=torch.float64) for name in linears}

    def at(self, timestep: Tensor) -> None:
        """Say which timestep (1,) is replayed next, to ranges that depend on it."""
        if self._timestep_index is not None:
            self._timestep_index.update(timestep)

    def observer(self, name: str) -> Observer:
        """Make an observer of the layer's input (K, 2N, T, I) and output (K, 2N, T, O)."""
        bias = self._linears[name].bias
        layer = self._layers[name]
        quantised = QuantLinear(layer, layer.bias(None), timestep_index=self._timestep_index)

        def observe_output(x: Tensor, y: Tensor) -> None:
            product = y - bias
            error = quantised(x.flatten(0, 1)).view_as(product) - product
            sums = torch.stack([
                product.square().sum(dtype=torch.float64),
                error.square().sum(dtype=torch.float64),
            ])
            self._squared_sums[name] += sums.cpu()

        return observe_output

    def decibels(self) -> dict[str, float]:
        """Compute the SQNR in dB of every layer's output, over all that was observed."""
        return {
            name: float(10 * torch.log10(signal / noise))
            for name, (signal, noise) in self._squared_sums.items()
        }


@torch.inference_mode()
def observe(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    drive: Drive,
    wanted: list[str],
) -> Observed:
    """Sample once with the float ``model`` and look at the layers.

    Args:
        drive: lets the model sample once; a few images are enough.
        wanted: layers whose weights and inputs are shown.
    """
    # Sample, and keep the trajectory.
    places = places_of(model)
    linears = {name: model.get_submodule(name) for name in places}
    sites = architecture_of(model).sites(model, "blocks")
    wanted = [name for name in linears if name in wanted]
    spreads = Spreads(wanted)
    with hooked(model, list(linears), spreads.see):
        trajectory, maxima = record(model, sites, drive)

    # Replay three of its steps.
    middle = len(trajectory) // 2
    watched = sorted({0, middle, len(trajectory) - 1})
    errors = OutputErrors(linears, layers)
    inputs = {name: MiddleInput() for name in wanted}
    for step in watched:
        watch = Watch()
        for name in linears:
            watch.add(name, OutputErrors, partial(errors.observer, name))
        if step == middle:
            for name, observer in inputs.items():
                watch.add(name, MiddleInput, lambda observer=observer: observer)
        errors.at(trajectory.at(step).timesteps)
        replay(model, trajectory.at(step), watch, 1, f"errors at step {step}")
    return Observed(
        absmax={name: maxima[site.name].cpu() for name, site in places.items()},
        error_db=errors.decibels(),
        deviations=spreads.deviations,
        watched=watched,
        places=places,
        shown={
            name: ShownLayer(
                weight=linears[name].weight.abs().cpu(),
                inputs=inputs[name].magnitudes,
                step_quantiles=spreads.quantiles[name],
                image_quantiles=inputs[name].quantiles)
            for name in wanted
        })


class MiddleInput:
    """Keeps what figures show of a linear's input at the one step that is replayed.

    Attributes:
        magnitudes: (T, I), of the first image.
        quantiles: (N, 7), of every image.
    """

    magnitudes: Tensor
    quantiles: Tensor

    def __call__(self, x: Tensor, _: Tensor) -> None:
        self.magnitudes = x[0, 0].abs().cpu()
        self.quantiles = image_quantiles(x[0]).cpu()
