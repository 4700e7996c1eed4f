"""The one quantised layer."""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from quant.lowrank import LowRankWeight
from quant.quantizer import QuantSpec, fake_quantize

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears a recipe quantises, by state-dict name, in the order in which a forward pass meets them."""
    return {f"blocks.{i}.{name}": block.get_submodule(name) for i, block in enumerate(model.blocks) for name in BLOCK_LINEARS}


@dataclass(frozen=True)
class QuantizedLayer:
    """What quantisation found for one linear: ``W diag(smooth) ~ weight``; ``smooth`` (I,) float32 or None for all ones."""

    weight: LowRankWeight
    smooth: Tensor | None


class QuantLinear(nn.Module):
    """``y = Qa(x / s) (W_hat + L R)^T + b`` with simulated quantisation (DiTAS, eq. 3).

    The low-rank branch sees the quantised activation, so it is added to the weight once. Buffers: ``weight`` (O, I), ``bias``
    (O,) or None, ``smooth`` (I,) or None. Input (N, T, I), output (N, T, O).
    """

    def __init__(self, layer: QuantizedLayer, bias: Tensor | None, act: QuantSpec):
        super().__init__()
        self.register_buffer("weight", layer.weight.dense())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("smooth", layer.smooth)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.smooth is not None:
            x = x / self.smooth
        return F.linear(fake_quantize(x, self.act), self.weight, self.bias)


def install(model: nn.Module, layers: dict[str, QuantizedLayer], act: QuantSpec) -> nn.Module:
    """Replace the named linears of ``model`` by ``QuantLinear`` s, in place; returns the model in eval mode."""
    for name, layer in layers.items():
        linear = model.get_submodule(name)
        model.set_submodule(name, QuantLinear(layer, linear.bias, act))
    return model.eval()
