"""From a file to quantised linears: while diffusers loads a model, and when it is first called."""
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ditas.backends import computing_linear, faster_backend, obstacle
from ditas.layouts import Data, Layout, OperandLayout, add_bias, from_data
from ditas.packing import (
    RANGES,
    PackedLinear,
    Tensors,
    put_operands,
    unpacked,
    welcome_adapters,
)
from ditas.request import Request
from errors import UserError
from quant.activations.attention import Operands
from quant.activations.quantisers import TimestepIndex, watch_timesteps
from quant.backend import resolve
from quant.checkpoint.tensors import TIMESTEPS, read_operands
from quant.install import unnumbered, with_stand_in
from quant.layers.fold import ROW_SCALES, DividedArgument, argument_of
from quant.layers.quantised import QuantizedLayer
from quant.numerics.tokens import matrix


class AwaitedLinear(nn.Module):
    """Stands where a quantised linear will be; its buffers are the tensors of the file.

    Attributes:
        shape: (O, I).
        window: of a patch convolution; None for a linear.
        kind: the type of the float weight.
        device: where the linear will be.
    """

    def __init__(self, old: nn.Module, layout: Layout):
        super().__init__()
        self.shape = matrix(old).shape
        self.window = old.kernel_size if isinstance(old, nn.Conv2d) else None
        self.kind = old.weight.dtype
        self.device = torch.device("cpu")
        self.layout = layout
        for name in layout.tensors:
            self.register_buffer(name, torch.empty(0, device="meta"))


class AwaitedOperands(nn.Module):
    """Stands where the quantised operands of an attention will be; it holds their ranges."""

    def __init__(self, layout: OperandLayout):
        super().__init__()
        self.layout = layout
        self.register_buffer(RANGES, torch.empty(0, device="meta"))

    def operands(self, timesteps: Tensors) -> Operands:
        """Read the operands, without factors; ``timesteps`` as of ``unpacked``.

        Raises:
            ValueError, KeyError: the ranges are missing or of another shape.
        """
        tensors = {".operands": self._buffers[RANGES], **timesteps}
        return read_operands(tensors, "", 4, self.layout.spec, self.layout.has_powers)


def put_awaited(model: nn.Module, stored: Data) -> None:
    """Make room in a skeleton for all that a file holds.

    Raises:
        UserError: the file is of another model.
    """
    try:
        for name, layout in from_data(stored["layouts"]).items():
            model.set_submodule(name, AwaitedLinear(model.get_submodule(name), layout))
        # Folders of the first version have neither of the two.
        for name, data in stored.get("operands", {}).items():
            model.get_submodule(name).operands = AwaitedOperands(OperandLayout.from_data(data))
        if stored.get("clock") is not None:
            empty = torch.empty(0, device="meta")
            watch_timesteps(model, TimestepIndex(empty), stored["clock"])
        for name in stored["added_biases"]:
            add_bias(model.get_submodule(name), "meta")
        for block, arguments in stored["divided_arguments"].items():
            for argument, count in arguments.items():
                argument_of(model.get_submodule(block), argument, "meta").reach(count)
        for name in stored["row_scales"]:
            empty = torch.empty(0, device="meta")
            model.get_submodule(name).register_buffer(ROW_SCALES, empty)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the quantization_config is damaged, or not that of a "
                        f"{type(model).__name__} ({error}): save the model again") from None


def owner_of(modules: dict[str, nn.Module], tensor_name: str) -> nn.Module | None:
    """Find the module whose tensor stays as the file has it; None: it is an ordinary one.

    Args:
        modules: of the model, by name.
    """
    name, _, tensor = tensor_name.rpartition(".")
    owner = modules.get(name)
    kinds = AwaitedLinear | AwaitedOperands | DividedArgument | TimestepIndex
    return owner if isinstance(owner, kinds) or tensor == ROW_SCALES else None


def take(
    modules: dict[str, nn.Module], tensor_name: str, value: Tensor, device: torch.device
) -> None:
    """Give a tensor of the file to its owner among the modules of the model."""
    owner, name = owner_of(modules, tensor_name), tensor_name.rpartition(".")[2]
    if isinstance(owner, AwaitedLinear):
        # Codes are unpacked on the CPU, and stay there.
        owner.device, device = torch.device(device), "cpu"
    owner.register_buffer(name, value.to(device))


class Arithmetic:
    """What the linears of a loaded model compute in; chosen when the first of them is needed.

    Args:
        backend: ``fake``, ``integer``, or ``auto`` until both are timed.
        linears: those of the model, some of which are timed.
        timestep_index: the model's, where ranges depend on the timestep.
    """

    def __init__(
        self, backend: str, linears: list["StowedLinear"], timestep_index: TimestepIndex | None
    ):
        self.backend = backend
        self.timestep_index = timestep_index
        self._linears = linears

    @property
    def timesteps(self) -> Tensors:
        """Those of all ranges of the model, as ``unpacked`` wants them."""
        index = self.timestep_index
        return {} if index is None else {TIMESTEPS: index.timesteps}

    def settle(self, kind: torch.dtype, device: torch.device) -> str:
        """Choose ``fake`` or ``integer``."""
        if self.backend == "auto":
            layers = (linear.layer()[0] for linear in self._linears)
            self.backend = faster_backend(layers, kind, device)
        self._linears = []
        return self.backend


class StowedLinear(LazyModuleMixin, PackedLinear):
    """A quantised linear as the file has it; its first call expands it to what computes.

    So a model is loaded in the memory of its file, and is expanded where it computes.
    It is a lazy module of PyTorch, which torch.compile expands before it looks inside.

    Args:
        awaited: with all of its tensors. Bytes, such as codes, stay views of the file, which nobody
            multiplies; other numbers are copied (see ``own_values``).
        arithmetic: shared by all linears of the model.
    """

    cls_to_become = PackedLinear

    def __init__(self, awaited: AwaitedLinear, arithmetic: Arithmetic):
        # accelerate may have moved them to where the linear will be.
        in_file = {name: value.cpu() if value.dtype == torch.uint8 else value.cpu().clone()
                   for name, value in awaited._buffers.items()}
        stand_in = with_stand_in(nn.Module(), awaited.kind, awaited.device)
        with warnings.catch_warnings():
            # Of lazy modules PyTorch says that they may change.
            warnings.simplefilter("ignore", UserWarning)
            super().__init__(stand_in, in_file, awaited.shape)
        self.layout = awaited.layout
        self.window = awaited.window
        self.arithmetic = arithmetic

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


def stow(model: nn.Module, request: Request) -> None:
    """Put quantised linears, and operands of attentions, where they are awaited.

    Raises:
        UserError: tensors are missing or of another shape, or the backend does not go with them.
    """
    awaited = _modules_of(model, AwaitedLinear)
    linears: list[StowedLinear] = []
    device = next(iter(awaited.values())).device
    backend = resolve(request.backend, obstacle(request), device, lambda: "auto")
    arithmetic = Arithmetic(backend, linears, getattr(model, "timestep_index", None))
    try:
        for name, module in awaited.items():
            linears.append(StowedLinear(module, arithmetic))
            # It is read again when it is called first.
            linears[-1].layer()
            model.set_submodule(name, linears[-1])
        operands = _read_operands(model, arithmetic.timesteps)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"the tensors of this {type(model).__name__} do not fit its "
                        f"quantization_config ({error}): save the model again") from None
    put_operands(model, operands, arithmetic.timestep_index, device)
    welcome_adapters()
    own_values(model)


def _read_operands(model: nn.Module, timesteps: Tensors) -> dict[str, Operands]:
    """Read the operands of attentions, by their names; what awaited them goes."""
    operands = {}
    for name, module in _modules_of(model, AwaitedOperands).items():
        attention = name.removesuffix(".operands")
        layer, _ = model.get_submodule(module.layout.reader).layer()
        factors = layer.smoothing.factors
        operands[attention] = replace(module.operands(timesteps), factors=factors)
        del model.get_submodule(attention).operands
    return operands


def _modules_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def own_values(model: nn.Module) -> None:
    """Copy the parameters and buffers that are views of a file.

    A view lies wherever the file has it: products with it are rounded differently where that is no
    multiple of a register's width.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
