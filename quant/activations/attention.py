"""Attention whose operands are quantised too: queries, keys, values and the softmax output (PTQ4DiT, section 3; RepQ-ViT, section 3)."""
from dataclasses import dataclass, replace

from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from quant.activations.quantisers import Activation, activation_module
from quant.activations.softmax import LogSqrt2, PowersOfRootTwo


@dataclass(frozen=True)
class Operands:
    """Quantisers of one attention.

    Attributes:
        query, key, value: static, one range per tensor.
        probabilities: of the softmax output, static.
        smooth: (D,) float32 divides the value before it is quantised and multiplies it after, where the next linear divides its input
            by it; None for all ones, and after folding.
    """

    query: Activation
    key: Activation
    value: Activation
    probabilities: Activation | PowersOfRootTwo
    smooth: Tensor | None = None

    def fold(self) -> "Operands":
        """The same for values that come already divided."""
        return replace(self, smooth=None)


class QuantAttention(nn.Module):
    """Attention on tokens (N, T, D), with simulated quantisation of what enters its two products; its linears stay as they are."""

    def __init__(self, attention: Attention, operands: Operands):
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.query, self.key, self.value = (activation_module(each) for each in (operands.query, operands.key, operands.value))
        powers = isinstance(operands.probabilities, PowersOfRootTwo)
        self.probabilities = LogSqrt2(operands.probabilities) if powers else activation_module(operands.probabilities)
        self.register_buffer("smooth", operands.smooth)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)  # (N, T, D) each
        q, k = self._seen(self.query, q), self._seen(self.key, k)
        v = self._seen(self.value, v) if self.smooth is None else (self._seen(self.value, v / self.smooth) * self.smooth).to(x.dtype)
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))  # (N, heads, T, D / heads)
        probabilities = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        mixed = self._seen(self.probabilities, probabilities) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def _seen(module: nn.Module, values: Tensor) -> Tensor:
        """What a product sees of its operand."""
        codes, scale = module(values.float())
        return (codes if scale is None else codes * scale).to(values.dtype)


def softmax_of(attention: Attention, qkv: Tensor) -> Tensor:
    """Attention probabilities (N, heads, T, T) from the output of its qkv (N, T, 3D)."""
    q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q * attention.scale @ k.transpose(-2, -1)).softmax(-1)
