"""What quantisation does to each layer, observed on a short trajectory of the float model."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import config
from architectures.dit import block_linears
from diffusion import Schedule
from quant.calibration.trajectory import Trajectory, record, replay
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.pipeline import Start

IMAGES = 4  # in the trajectory that a report looks at


@dataclass(frozen=True)
class Observed:
    """Of every quantised linear, by name.

    Attributes:
        absmax: (steps, I), largest magnitude of each input channel at each step.
        error_db: SQNR of the layer's output on the float model's inputs at the first, middle and last step.
        inputs: (T, I) magnitudes of one image's input at the middle step, for the layers asked for.
        watched: the steps (indices in sampling order) behind ``error_db``.
    """

    absmax: dict[str, Tensor]
    error_db: dict[str, float]
    inputs: dict[str, Tensor]
    watched: list[int]

    @property
    def steps(self) -> int:
        return len(next(iter(self.absmax.values())))


def default_layers(names: list[str]) -> list[str]:
    """The last fc2, where the paper shows outliers (appendix, figures 1 to 4), and the last qkv."""
    return [[name for name in names if name.endswith(kind)][-1] for kind in ("mlp.fc2", "attn.qkv")]


@torch.inference_mode()
def observe(model: nn.Module, layers: dict[str, QuantizedLayer], schedule: Schedule, start: Start,
            wanted: list[str]) -> Observed:
    """Sample once with the float ``model`` and look at the layers.

    Args:
        start: a few images are enough.
        wanted: layers whose inputs are kept.
    """
    linears = block_linears(model)
    trajectory, absmax = record(model, linears, schedule, start.labels, config.calibration_cfg_scale, start.x, start.draw, "report")
    watched = sorted({0, len(schedule) // 2, len(schedule) - 1})
    energies = {name: torch.zeros(2, dtype=torch.float64) for name in linears}  # of the output and of its error
    inputs, middle = {}, watched.index(len(schedule) // 2)
    for i, step in enumerate(watched):

        def observer(name, keep=i == middle):
            quantised = QuantLinear(layers[name], layers[name].bias(None))

            def see(x, y):  # (1, 2N, T, I), (1, 2N, T, O)
                product = y[0] - linears[name].bias
                error = quantised(x[0]) - product
                energies[name] += torch.stack([product.square().sum(dtype=torch.float64), error.square().sum(dtype=torch.float64)]).cpu()
                if keep and name in wanted:
                    inputs[name] = x[0, 0].abs().cpu()
            return see

        one = Trajectory(trajectory.latents[step:step + 1], trajectory.timesteps[step:step + 1], trajectory.labels)
        replay(model, linears, one, {name: [observer(name)] for name in linears}, 1, f"errors at step {step}")
    error_db = {name: float(10 * torch.log10(signal / noise)) for name, (signal, noise) in energies.items()}
    return Observed({name: values.cpu() for name, values in absmax.items()}, error_db, inputs, watched)
