"""Images on their way through a model, one transformer block at a time."""
import torch
from torch import Tensor, nn

import config
from architectures.registry import architecture_of
from architectures.sites import Call, call_of
from quant.activations.quantisers import TimestepIndex
from quant.calibration.calls import batch_size


class _Reached(Exception):
    """The first block was reached; what follows need not be computed."""


class BlockChain:
    """Many images between two blocks of a model; they begin before the first one.

    Args:
        model: float or quantised.
        inputs: a call of the model with P images.

    Attributes:
        timestep_index: the model's, if it has ranges per timestep.
    """

    def __init__(self, model: nn.Module, inputs: Call):
        self._architecture = architecture_of(model)
        self._images = batch_size(inputs, self._architecture.batched)
        self._call = _first_call(model, self._architecture.blocks(model)[0], inputs)
        self.timestep_index: TimestepIndex | None = getattr(model, "timestep_index", None)
        self._steps = None if self.timestep_index is None else self.timestep_index.index  # (P,)

    def run(self, block: nn.Module, chosen: Tensor) -> Tensor:
        """Run a block on some of the images, (n,) int64, and return its output (n, T, D)."""
        if self.timestep_index is not None:
            self.timestep_index.index = self._steps[chosen]
        return block(**{name: self._pick(value, chosen) for name, value in self._call.items()})

    def outputs(self, block: nn.Module) -> Tensor:
        """Run a block on all images, a batch at a time, and return its output (P, T, D)."""
        device = next(value for value in self._call.values() if isinstance(value, Tensor)).device
        every = torch.arange(self._images, device=device)
        return torch.cat([self.run(block, chosen)
                          for chosen in every.split(config.reconstruction_batch)])

    def advance(self, output: Tensor) -> None:
        """Go on to the next block with what this one gave, (P, T, D)."""
        self._call = self._architecture.advance(self._call, output)

    def _pick(self, value, chosen: Tensor):
        per_image = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self._images
        return value[chosen] if per_image else value


def _first_call(model: nn.Module, first: str, inputs: Call) -> Call:
    """Run a model up to its first block; return the arguments of the block's call."""
    reached: Call = {}

    def hook(block, args, kwargs):
        reached.update(call_of(block, args, kwargs))
        raise _Reached

    handle = model.get_submodule(first).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(**inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return reached
