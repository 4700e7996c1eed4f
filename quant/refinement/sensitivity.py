"""What a group size costs a layer, looked at on its own: the costs of an integer program.

Every layer's weight is rounded to the nearest, and its input comes from the float model.
"""
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from architectures.sites import Site
from quant.activations.quantisers import activation_module
from quant.calibration.observers import Samples
from quant.calibration.watch import Watch
from quant.layers.quantised import QuantizedLayer

# The cost of a layer, from its inputs (..., I) and weight (O, I) as smoothing leaves both.
Cost = Callable[[Tensor, Tensor, QuantizedLayer], float]


def output_error(inputs: Tensor, weight: Tensor, layer: QuantizedLayer) -> float:
    """Compute the mean squared error of a layer's outputs (the indicator that Q-DiT names)."""
    values, scale = activation_module(layer.act)(inputs)
    products = F.linear(values, layer.weight.dense())
    if scale is not None:
        products = products * scale
    return (products - F.linear(inputs, weight)).square().mean().item()


def hessian_error(inputs: Tensor, weight: Tensor, layer: QuantizedLayer) -> float:
    """Compute the Hessian's mean diagonal times the weight's squared error (HAWQ-V2, eq. 1).

    The Hessian is that of the layer's output error, ``X^T X`` per output channel (BRECQ). So its
    trace needs no estimate, and the activations' own error has no part in it.
    """
    mean_diagonal = inputs.square().mean()
    return (mean_diagonal * (layer.weight.dense() - weight).square().sum()).item()


COSTS: dict[str, Cost] = {"ilp": output_error, "hessian": hessian_error}


class Sensitivity:
    """Keeps samples of every site's inputs.

    Args:
        samples_of: the observer of a site's inputs, which other parts may share.
    """

    def __init__(self, samples_of: Callable[[Site, Watch], Samples]):
        self._samples_of = samples_of
        self._samples: dict[str, Samples] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for samples of the input."""
        self._samples[site.name] = self._samples_of(site, watch)

    def inputs(self, site: Site) -> Tensor:
        """Return the samples of a site's input, (P, T, I)."""
        return self._samples[site.name].value


class NoSensitivity:
    """Looks at nothing."""

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for nothing."""
