"""The log-sqrt2 quantiser of attention probabilities (RepQ-ViT, Li et al., 2023)."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.numerics.ranges import best_range


def fake_quantize_log_sqrt2(p: Tensor, bits: int, scale: Tensor) -> Tensor:
    """The nearest ``scale * 2^(-q/2)`` in the log domain: ``q = round(-2 log2(p / scale))``, at least 0.

    What needs a code above ``2^bits - 1`` becomes 0, as in the published code; so there are ``2^bits + 1`` values, and 0 is not a code.

    Args:
        p: probabilities of any shape and floating type, which the result shares; 0 stays 0, NaN stays NaN.
        scale: float32, the largest value there is.
    """
    codes = (p.float() / scale).log2().mul_(-2).round_().clamp_(min=0)
    return torch.where(codes >= 2 ** bits, 0.0, torch.exp2(codes / -2) * scale).to(p.dtype)


@dataclass(frozen=True)
class PowersOfRootTwo:
    """That quantiser, static.

    Attributes:
        bits: of a code.
        scale: () float32.
    """

    bits: int
    scale: Tensor


@dataclass(frozen=True)
class _Unfitted:
    """The same as ``quant.numerics.ranges`` wants it: the upper end of the range is the scale."""

    bits: int

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor]:
        return (high,)

    def round_trip(self, x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize_log_sqrt2(x, self.bits, scale)


def fit_powers(sample: Tensor, bits: int, choice: str) -> PowersOfRootTwo:
    """For a sample of probabilities of any shape; ``choice`` of the scale is a key of ``quant.numerics.ranges.RANGES``, in the published code ``percentile``.

    Raises:
        ValueError: NaN or infinity, or an unknown choice.
    """
    scale, = best_range(sample.flatten().float(), (0,), _Unfitted(bits), choice)
    return PowersOfRootTwo(bits, scale.squeeze())


class LogSqrt2(nn.Module):
    """Simulates it; takes and gives what the modules of ``quant.activations.quantisers`` do. Buffer ``scale`` ()."""

    def __init__(self, powers: PowersOfRootTwo):
        super().__init__()
        self.register_buffer("scale", powers.scale)
        self.bits = powers.bits

    def forward(self, values: Tensor) -> tuple[Tensor, None]:
        return fake_quantize_log_sqrt2(values, self.bits, self.scale), None
