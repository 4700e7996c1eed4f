"""How quantised linears are written down: as plain data in a model's ``config.json``."""
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from quant.activations.attention import Operands
from quant.activations.quantisers import Activation
from quant.activations.softmax import PowersOfRootTwo
from quant.layers.fold import ROW_SCALES, DividedArgument
from quant.layers.quantised import QuantizedLayer
from quant.numerics.spec import QuantSpec

# A linear as a file describes it.
Data = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """What linears of one kind have in common.

    Attributes:
        weight, act: how weight and input are quantised; static ranges are without the range.
        tensors: of each of them in the file.
    """

    weight: QuantSpec
    act: QuantSpec | None
    tensors: tuple[str, ...]

    def activation(self) -> Activation | None:
        return None if self.act is None else Activation(self.act)


@dataclass(frozen=True)
class OperandLayout:
    """How the operands of an attention are quantised, but for the ranges.

    Attributes:
        spec: bits and what shares a range.
        has_powers: the probabilities are powers of the square root of 2.
        reader: the linear that reads the averaged values. Where it divides its input, values are
            divided before they are quantised, too.
    """

    spec: QuantSpec
    has_powers: bool
    reader: str

    @classmethod
    def from_data(cls, data: Data) -> "OperandLayout":
        """Read what ``asdict`` wrote.

        Raises:
            KeyError, TypeError: it is damaged.
        """
        return cls(QuantSpec(**data["spec"]), data["has_powers"], data["reader"])


def operand_layout(operands: Operands, reader: str) -> OperandLayout:
    """Say how the operands of an attention are laid out."""
    has_powers = isinstance(operands.probabilities, PowersOfRootTwo)
    return OperandLayout(operands.query.spec, has_powers, reader)


def layout_of(layer: QuantizedLayer, tensors: dict[str, Any]) -> Layout:
    """Say how a layer, and the tensors that it is written as, are laid out."""
    act = None if layer.act is None else layer.act.spec
    return Layout(layer.weight.base.spec, act, tuple(tensors))


def as_data(layouts: dict[str, Layout]) -> list[Data]:
    """Write the layouts of linears, by their names; those that share one stand together."""
    alike: dict[Layout, list[str]] = {}
    for name, layout in layouts.items():
        alike.setdefault(layout, []).append(name)
    return [{**asdict(layout), "tensors": list(layout.tensors), "linears": names}
            for layout, names in alike.items()]


def from_data(data: list[Data]) -> dict[str, Layout]:
    """Read what ``as_data`` wrote.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    layouts = {}
    for entry in data:
        act = None if entry["act"] is None else QuantSpec(**entry["act"])
        layout = Layout(QuantSpec(**entry["weight"]), act, tuple(entry["tensors"]))
        layouts |= dict.fromkeys(entry["linears"], layout)
    return layouts


def divided_arguments(model: nn.Module) -> dict[str, dict[str, int]]:
    """List the arguments that blocks divide on the way in, with the number of their entries."""
    divided: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, DividedArgument):
            block, _, argument = name.rpartition(".")
            block = block.removesuffix(".divided_arguments")
            divided.setdefault(block, {})[argument] = len(module.divisor)
    return divided


def linears_with_row_scales(model: nn.Module) -> list[str]:
    """List the float linears whose rows were divided."""
    return [name for name, module in model.named_modules() if hasattr(module, ROW_SCALES)]


def add_bias(linear: nn.Linear, device: torch.device | str) -> None:
    """Give a linear a bias of zeros."""
    bias = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=device)
    linear.bias = nn.Parameter(bias, requires_grad=False)
