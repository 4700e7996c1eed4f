"""Quantised linears as a file has them, until their first call expands them to what computes.

So a model is quantised, and loaded, in the memory of its file, and is expanded where it computes.
"""
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ditas.backends import computing_linear, faster_backend
from ditas.layouts import Layout
from ditas.packing import PackedLinear, Tensors, unpacked
from quant.activations.quantisers import TimestepIndex
from quant.checkpoint.tensors import TIMESTEPS
from quant.install import unnumbered, with_stand_in
from quant.layers.quantised import QuantizedLayer


@dataclass(frozen=True)
class Origin:
    """What a quantised linear keeps of the float one that it replaces.

    Attributes:
        shape: (O, I).
        window: of a patch convolution; None for a linear.
        kind: the type of the weight.
    """

    shape: torch.Size
    window: tuple[int, int] | None
    kind: torch.dtype

    @classmethod
    def of(cls, linear: nn.Module) -> "Origin":
        """Describe a float linear or patch convolution."""
        window = linear.kernel_size if isinstance(linear, nn.Conv2d) else None
        return cls(linear.weight.flatten(1).shape, window, linear.weight.dtype)


class Arithmetic:
    """What the linears of a model compute in; chosen when the first of them is needed.

    Args:
        backend: ``fake``, ``integer``, or ``auto`` until both are timed.
        timestep_index: the model's, where ranges depend on the timestep.

    Attributes:
        waiting: linears that compute in it, some of which are timed; none once it is chosen.
    """

    def __init__(self, backend: str, timestep_index: TimestepIndex | None):
        self.backend = backend
        self.timestep_index = timestep_index
        self.waiting: list[StowedLinear] = []

    @property
    def timesteps(self) -> Tensors:
        """Those of all ranges of the model, as ``unpacked`` wants them."""
        index = self.timestep_index
        return {} if index is None else {TIMESTEPS: index.timesteps}

    def settle(self, kind: torch.dtype, device: torch.device) -> str:
        """Choose ``fake`` or ``integer``."""
        if self.backend == "auto":
            layers = (linear.layer()[0] for linear in self.waiting)
            self.backend = faster_backend(layers, kind, device)
        self.waiting = []
        return self.backend


class StowedLinear(LazyModuleMixin, PackedLinear):
    """A quantised linear as the file has it; its first call expands it to what computes.

    It is a lazy module of PyTorch, which torch.compile expands before it looks inside.

    Args:
        layout: of the tensors.
        in_file: as of ``Packed``.
        origin: of the linear that it replaces.
        device: where the model's code finds it until it is expanded.
        arithmetic: shared by all linears of the model.
    """

    cls_to_become = PackedLinear

    def __init__(
        self, layout: Layout, in_file: Tensors, origin: Origin, device: torch.device,
        arithmetic: Arithmetic,
    ):
        stand_in = with_stand_in(nn.Module(), origin.kind, device)
        with warnings.catch_warnings():
            # Of lazy modules PyTorch says that they may change.
            warnings.simplefilter("ignore", UserWarning)
            super().__init__(stand_in, in_file, origin.shape)
        self.layout = layout
        self.window = origin.window
        self.arithmetic = arithmetic
        arithmetic.waiting.append(self)

    @property
    def is_patches(self) -> bool:
        return self.window is not None

    def layer(self) -> tuple[QuantizedLayer, Tensor | None]:
        """Read the layer and the linear's bias.

        Raises:
            ValueError, KeyError: a tensor is missing or of another shape.
        """
        return unpacked(self.in_file, self.weight.shape, self.layout.weight,
                        self.layout.activation(), self.arithmetic.timesteps)

    # Whatever the first call is for, its tensors serve all later ones.
    @torch.inference_mode(False)
    @torch.no_grad()
    def initialize_parameters(self, x: Tensor) -> None:
        """Expand the linear on the device of its first input."""
        kind, device = self.weight.dtype, unnumbered(x.device)
        backend = self.arithmetic.settle(kind, device)
        layer, bias = self.layer()
        self.computing = computing_linear(
            layer, bias, backend, kind, device, self.window, self.arithmetic.timestep_index)
        del self.layout, self.window, self.arithmetic
