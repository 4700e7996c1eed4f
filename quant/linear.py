"""The one quantised layer."""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.lowrank import LowRankWeight
from quant.quantizer import QuantSpec, fake_quantize

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
MODULATION = "adaLN_modulation.1"


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears a recipe quantises, by state-dict name, in the order in which a forward pass meets them."""
    return {f"blocks.{i}.{name}": block.get_submodule(name) for i, block in enumerate(model.blocks) for name in BLOCK_LINEARS}


def modulation_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears behind every block's adaptive LayerNorms, by state-dict name."""
    return {f"blocks.{i}.{MODULATION}": block.get_submodule(MODULATION) for i, block in enumerate(model.blocks)}


@dataclass(frozen=True)
class QuantizedLayer:
    """What quantisation found for one linear: ``W diag(smooth) ~ weight``.

    Attributes:
        smooth: (I,) float32, divides the input; None for all ones.
        rows: (O,) float32, multiplies the output channels (what folding put there); None for all ones.
    """

    weight: LowRankWeight
    smooth: Tensor | None
    rows: Tensor | None = None

    def dense(self) -> Tensor:
        """(O, I) float32, seen from the divided input."""
        weight = self.weight.dense()
        return weight if self.rows is None else weight * self.rows[:, None]

    def divide_rows(self, rows: slice, factors: Tensor) -> "QuantizedLayer":
        """The same with these output channels divided by ``factors``."""
        every = torch.ones(len(self.weight.left), device=factors.device) if self.rows is None else self.rows.clone()
        every[rows] /= factors
        return replace(self, rows=every)


class QuantLinear(nn.Module):
    """``y = Qa(x / s) (W_hat + L R)^T + b`` with simulated quantisation (DiTAS, eq. 3).

    The low-rank branch sees the quantised activation, so it is added to the weight once. Buffers: ``weight`` (O, I) of type ``dtype``,
    ``bias`` (O,) or None, ``smooth`` (I,) float32 or None. Input (..., T, I), output (..., T, O), both of type ``dtype``; ranges and
    codes are float32 work.
    """

    def __init__(self, layer: QuantizedLayer, bias: Tensor | None, act: QuantSpec, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.register_buffer("weight", layer.dense().to(dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype, copy=True))
        self.register_buffer("smooth", layer.smooth)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        if self.smooth is not None:
            values = values / self.smooth
        return F.linear(fake_quantize(values, self.act).to(x.dtype), self.weight, self.bias)
