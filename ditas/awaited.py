"""From a file to quantised linears, while diffusers loads a model."""
from dataclasses import replace

import torch
from torch import Tensor, nn

from ditas.backends import allowed_backend
from ditas.layouts import Data, Layout, OperandLayout, add_bias, from_data
from ditas.packing import RANGES, Tensors, packed_operands, put, welcome_adapters
from ditas.request import Request
from ditas.stowed import Arithmetic, Origin, StowedLinear
from errors import UserError
from quant.activations.attention import Operands
from quant.activations.quantisers import TimestepIndex, watch_timesteps
from quant.checkpoint.tensors import read_operands
from quant.layers.fold import ROW_SCALES, DividedArgument, argument_of


class AwaitedLinear(nn.Module):
    """Stands where a quantised linear will be; its buffers are the tensors of the file.

    Attributes:
        origin: of the float linear.
        device: where the linear will be.
    """

    def __init__(self, old: nn.Module, layout: Layout):
        super().__init__()
        self.origin = Origin.of(old)
        self.device = torch.device("cpu")
        self.layout = layout
        for name in layout.tensors:
            self.register_buffer(name, torch.empty(0, device="meta"))

    def in_file(self) -> Tensors:
        """Give the tensors as ``Packed`` has them.

        Bytes, such as codes, stay views of the file, which nobody multiplies; other numbers are
        copied (see ``own_values``).
        """
        # accelerate may have moved them to where the linear will be.
        return {name: value.cpu() if value.dtype == torch.uint8 else value.cpu().clone()
                for name, value in self._buffers.items()}

    def stowed(self, arithmetic: Arithmetic) -> StowedLinear:
        """Make the linear that is awaited.

        Raises:
            ValueError, KeyError: a tensor is missing or of another shape.
        """
        linear = StowedLinear(self.layout, self.in_file(), self.origin, self.device, arithmetic)
        # It is read again when it is called first.
        linear.layer()
        return linear


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


def put_stowed(model: nn.Module, request: Request) -> None:
    """Put quantised linears, and operands of attentions, where they are awaited.

    Raises:
        UserError: tensors are missing or of another shape, or the backend does not go with them.
    """
    awaited = _modules_of(model, AwaitedLinear)
    device = next(iter(awaited.values())).device
    arithmetic = Arithmetic(
        allowed_backend(request, device), getattr(model, "timestep_index", None))
    try:
        linears = {name: module.stowed(arithmetic) for name, module in awaited.items()}
        operands = _read_operands(model, linears, arithmetic.timesteps)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"the tensors of this {type(model).__name__} do not fit its "
                        f"quantization_config ({error}): save the model again") from None
    put(model, linears, packed_operands(operands, arithmetic.timestep_index, device))
    welcome_adapters()
    own_values(model)


def _read_operands(
    model: nn.Module, linears: dict[str, StowedLinear], timesteps: Tensors
) -> dict[str, Operands]:
    """Read the operands of attentions, by their names; what awaited them goes."""
    operands = {}
    for name, module in _modules_of(model, AwaitedOperands).items():
        attention = name.removesuffix(".operands")
        layer, _ = linears[module.layout.reader].layer()
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
