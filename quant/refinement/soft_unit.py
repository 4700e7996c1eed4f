"""The layers of a unit while their rounding is learned: in the place of the quantised ones."""
from dataclasses import replace

from torch import Tensor, nn

from architectures.sites import Unit
from quant.activations.attention import Operands, QuantOperands, quantize_operands
from quant.activations.quantisers import Activation, TimestepIndex
from quant.install import put_linear
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.tokens import matrix
from quant.refinement.soft_layers import LearnedStep, SoftLinear, StraightThrough, learnable

Layers = dict[str, QuantizedLayer]

# The quantisers of an attention whose steps can be learned.
_OPERANDS = ("query", "key", "value", "probabilities")


class SoftUnit:
    """The soft layers of a unit, which stand in a quantised model until ``harden``.

    Args:
        model: float.
        quantised: a copy of it with quantised layers, which changes.
        layers, operands: of the whole model, as they are before this unit is learned.

    Attributes:
        linears: whose rounding is learned, by name, in the order of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        quantised: nn.Module,
        unit: Unit,
        layers: Layers,
        operands: dict[str, Operands],
    ):
        self._model = model
        self._quantised = quantised
        self._index: TimestepIndex | None = getattr(quantised, "timestep_index", None)
        self.linears: dict[str, SoftLinear] = {}
        for name in layers:
            if name in unit.linears:
                self.linears[name] = self._soft_linear(name, layers[name])
                put_linear(quantised, name, self.linears[name])
        self._attentions = [name for name in unit.attentions if name in operands]
        for name in self._attentions:
            self._soften_operands(name, operands[name])

    def steps(self) -> list[Tensor]:
        """List the learned steps of its activation quantisers."""
        owners = [*self.linears.values(), *map(self._operands_of, self._attentions)]
        return [module.scale for owner in owners for module in owner.modules()
                if isinstance(module, LearnedStep)]

    def harden(self, layers: Layers, operands: dict[str, Operands]) -> None:
        """Put what was learned into ``layers``, ``operands`` and the quantised model."""
        for name, soft in self.linears.items():
            layers[name] = soft.harden()
            bias = layers[name].bias(self._model.get_submodule(name).bias)
            put_linear(self._quantised, name, QuantLinear(
                layers[name], bias, timestep_index=self._index))
        for name in self._attentions:
            learned = {}
            for operand, module in self._operands_of(name).named_children():
                if isinstance(module, LearnedStep):
                    act = getattr(operands[name], operand)
                    learned[operand] = replace(act, scale=module.scale.detach())
            operands[name] = replace(operands[name], **learned)
            quantize_operands(
                self._quantised.get_submodule(name), QuantOperands(operands[name], self._index))

    def _soft_linear(self, name: str, layer: QuantizedLayer) -> SoftLinear:
        linear = self._model.get_submodule(name)
        weight = layer.smoothing.of_weight(matrix(linear)).detach()
        bias = None if linear.bias is None else linear.bias.detach()
        return SoftLinear(weight, layer, layer.bias(bias), self._index)

    def _soften_operands(self, name: str, operands: Operands) -> None:
        modules = self._operands_of(name)
        for operand in _OPERANDS:
            act, module = getattr(operands, operand), getattr(modules, operand)
            is_affine = isinstance(act, Activation)
            soft = learnable(act, self._index) if is_affine else StraightThrough(module)
            setattr(modules, operand, soft)

    def _operands_of(self, attention: str) -> nn.Module:
        return self._quantised.get_submodule(attention).operands
