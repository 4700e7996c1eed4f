"""Images on their way through a model, one unit of reconstruction at a time."""
from typing import Any

import torch
from torch import Tensor, nn

import config
from architectures.registry import architecture_of
from architectures.sites import MODEL, Call, Unit, call_of, timesteps_of
from quant.activations.quantisers import TimestepIndex
from quant.calibration.calls import batch_size
from quant.streaming import accelerator_of, brought


class _Reached(Exception):
    """An entrance was reached; what follows need not be computed."""


class UnitChain:
    """Many images in front of a unit of a model.

    Args:
        model: float or quantised. Its layers may change while its units are run.
        inputs: a call of the model with P images.
    """

    def __init__(self, model: nn.Module, inputs: Call):
        architecture = architecture_of(model)
        self._model = model
        self._inputs = inputs
        self._images = batch_size(inputs, architecture.batched)
        self._call = inputs
        # The call of the unit that follows, where it is known.
        self._next: Call | None = None
        self._timestep_index: TimestepIndex | None = getattr(model, "timestep_index", None)
        if self._timestep_index is not None:
            self._steps = self._timestep_index.nearest(  # (P,)
                timesteps_of(inputs, architecture.clock))

    def enter(self, unit: Unit) -> None:
        """Go in front of a unit, whose predecessors have their final layers."""
        if self._next is not None:
            self._call = self._next
        elif unit.entrance == MODEL:
            self._call = self._inputs
        else:
            self._call = self._record(unit.entrance)

    def run(self, unit: Unit, chosen: Tensor) -> tuple[Tensor, ...]:
        """Run the unit on some of the images, (n,) int64; its outputs have n entries each."""
        if self._timestep_index is not None:
            self._timestep_index.index = self._steps[chosen]
        call = self._pick(self._call, chosen)
        with brought(self._model.get_submodule(unit.entrance), accelerator_of(call)):
            return unit.run(self._model, call)

    def outputs(self, unit: Unit) -> tuple[Tensor, ...]:
        """Run the unit on all images, a batch at a time; its outputs have P entries each."""
        parts = [self.run(unit, chosen) for chosen in self._batches()]
        outputs = tuple(torch.cat(part) for part in zip(*parts))
        if any(len(output) != self._images for output in outputs):
            raise ValueError(f"{unit.name} does not give an output for every image, "
                             "so that its rounding cannot be learned")
        return outputs

    def leave(self, unit: Unit, outputs: tuple[Tensor, ...]) -> None:
        """Go on behind the unit, with what it gave."""
        self._next = None
        if unit.advance is not None:
            self._next = unit.advance(self._call, *outputs)

    def _record(self, entrance: str) -> Call:
        """Run the model up to a module, a batch at a time; put the calls of the module together."""
        calls = [_entered_with(self._model, entrance, self._pick(self._inputs, chosen))
                 for chosen in self._batches()]
        return {name: self._joined([call[name] for call in calls]) for name in calls[0]}

    def _joined(self, parts: list[Any]) -> Any:
        """Join an argument with an entry per image; any other is the same in all batches."""
        is_tensor = isinstance(parts[0], Tensor) and parts[0].dim() > 0
        per_image = is_tensor and sum(len(part) for part in parts) == self._images
        return torch.cat(parts) if per_image else parts[0]

    def _batches(self) -> tuple[Tensor, ...]:
        """Split the numbers of the images into batches."""
        tensors = [value for value in self._inputs.values() if isinstance(value, Tensor)]
        every = torch.arange(self._images, device=tensors[0].device)
        return every.split(config.reconstruction_batch)

    def _pick(self, value: Any, chosen: Tensor) -> Any:
        """Take some of the images out of an argument, or out of all of them."""
        if isinstance(value, dict):
            return {name: self._pick(item, chosen) for name, item in value.items()}
        if isinstance(value, list) and len(value) == self._images:
            return [value[image] for image in chosen.tolist()]
        per_image = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self._images
        return value[chosen] if per_image else value


def _entered_with(model: nn.Module, entrance: str, inputs: Call) -> Call:
    """Run a model up to a module; return the arguments of the module's first call."""
    reached: Call = {}

    def hook(module, args, kwargs):
        reached.update(call_of(module, args, kwargs))
        raise _Reached

    handle = model.get_submodule(entrance).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(**inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return reached
