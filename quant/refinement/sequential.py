"""Second moments of what reaches a layer once all before it is quantised (GPTQ, as published).

The model goes along with its quantisation. At first its activations are quantised and its weights
are not. Stage by stage, a stage being a block or what lies before or behind all blocks, the moments
of the stage's inputs are taken and its weights replaced.
"""
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy

import torch
from torch import Tensor, nn

import config
from architectures.registry import architecture_of
from architectures.sites import Call, Site
from quant.activations.attention import Operands
from quant.activations.quantisers import Activation
from quant.calibration.calls import batch_size
from quant.install import install
from quant.layers.linear import PatchLinear, QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.parts import Task
from quant.weights.floating import float_weight
from quant.weights.low_rank import LowRankWeight

BEFORE, BEHIND = "before the blocks", "behind the blocks"


class _Seen(Exception):
    """All inputs of the stage were seen; what follows need not be computed."""


def stages_of(sites: list[Site]) -> list[list[Site]]:
    """Put sites into stages, in the order in which a forward pass meets these."""
    stages: dict[str, list[Site]] = {BEFORE: []}
    for site in sites:
        outside = BEFORE if len(stages) == 1 else BEHIND
        stages.setdefault(site.block or outside, []).append(site)
    return [stage for stage in stages.values() if stage]


class QuantisedSoFar:
    """A model whose weights become quantised stage by stage.

    Args:
        task: its model is left as it was.
        acts, smoothing: of every site, by name.
        operands: of the attentions; may be empty.
        inputs: a call of the model, of images drawn from the trajectory.
    """

    def __init__(
        self,
        task: Task,
        acts: dict[str, Activation],
        smoothing: dict[str, Smoothing],
        operands: dict[str, Operands],
        inputs: Call,
    ):
        layers = {}
        for site in task.sites:
            for name in site.linears:
                weight = smoothing[site.name].of_weight(task.weight(name))
                layers[name] = task.beside_the_model(QuantizedLayer(
                    float_weight(weight), acts[site.name], smoothing[site.name]))
        self._model = install(deepcopy(task.model), layers, operands=operands)
        self._batched = architecture_of(task.model).batched
        self._inputs = inputs

    @torch.no_grad()
    def moments(self, stage: list[Site]) -> dict[str, Tensor]:
        """Sum ``X^T X`` of what the products of a stage's linears see, (I, I) for each site."""
        moments: dict[str, Tensor] = {}
        for call in self._batches():
            with self._watched(stage, moments), suppress(_Seen):
                self._model(**call)
        return moments

    def put(self, weights: dict[str, LowRankWeight]) -> None:
        """Replace the weights of some linears."""
        for name, weight in weights.items():
            self._linear(name).weight.copy_(weight.dense())

    def _linear(self, name: str) -> QuantLinear:
        module = self._model.get_submodule(name)
        return module.linear if isinstance(module, PatchLinear) else module

    def _batches(self) -> Iterator[Call]:
        """Cut the call into batches."""
        count = batch_size(self._inputs, self._batched)
        for start in range(0, count, config.reconstruction_batch):
            here = slice(start, start + config.reconstruction_batch)
            yield {name: _images(value, here) if name in self._batched else value
                   for name, value in self._inputs.items()}

    @contextmanager
    def _watched(self, stage: list[Site], moments: dict[str, Tensor]) -> Iterator[None]:
        """Add the inputs of a stage to the moments while open, and end the call after the last."""
        missing = {site.name for site in stage}

        def hook_of(name: str):
            def hook(act: nn.Module, args: tuple, output: tuple[Tensor, Tensor | None]) -> None:
                values, scale = output
                rows = (values if scale is None else values * scale).flatten(0, -2)
                moment = moments.setdefault(
                    name, torch.zeros(rows.shape[1], rows.shape[1], device=rows.device))
                moment.addmm_(rows.T, rows)
                missing.discard(name)
                if not missing:
                    raise _Seen
            return hook

        handles = [self._linear(site.linears[0]).act.register_forward_hook(hook_of(site.name))
                   for site in stage]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _images(value, here: slice):
    """Cut images out of an argument that has an entry for each."""
    if isinstance(value, dict):
        return {key: _images(item, here) for key, item in value.items()}
    return value[here] if isinstance(value, Tensor | list) else value
