"""The log-sqrt2 quantiser of attention probabilities (RepQ-ViT, Li et al., 2023)."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.numerics.ranges import best_range


def fake_quantize_log_sqrt2(p: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Round to the nearest ``scale * 2^(-q/2)`` in the log domain, and back.

    The codes are ``q = round(-2 log2(p / scale))``, at least 0. What needs a code above
    ``2^bits - 1`` becomes 0, as in the published code. So there are ``2^bits + 1`` values, and 0 is
    not a code.

    Args:
        p: probabilities of any shape and floating type; 0 stays 0, NaN stays NaN.
        scale: float32, the largest value there is.

    Returns:
        The values, in the shape and type of ``p``.
    """
    codes = (p.float() / scale).log2().mul_(-2).round_().clamp_(min=0)
    values = torch.exp2(codes / -2) * scale
    return torch.where(codes >= 2 ** bits, 0.0, values).to(p.dtype)


@dataclass(frozen=True)
class PowersOfRootTwo:
    """Parameters of the log-sqrt2 quantiser, found once.

    Attributes:
        bits: code width.
        scale: () float32.
    """

    bits: int
    scale: Tensor


@dataclass(frozen=True)
class _ScaleSearch:
    """Adapter to ``RangedQuantizer``: the scale is searched as the upper end of a range."""

    bits: int

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor]:
        return (high,)

    def round_trip(self, x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize_log_sqrt2(x, self.bits, scale)


def fit_powers(sample: Tensor, bits: int, choice: str) -> PowersOfRootTwo:
    """Choose the scale for a sample of probabilities of any shape.

    Args:
        choice: how the scale is chosen, a key of ``quant.numerics.ranges.RANGES``; in the
            published code ``percentile``.

    Raises:
        ValueError: NaN or infinity, or an unknown choice.
    """
    parameters = best_range(sample.flatten().float(), (0,), _ScaleSearch(bits), choice)
    scale = parameters[0].squeeze()
    return PowersOfRootTwo(bits, scale)


class LogSqrt2(nn.Module):
    """Simulates the log-sqrt2 quantiser, with the signature of ``quant.activations.quantisers``.

    Buffer ``scale`` ().
    """

    def __init__(self, powers: PowersOfRootTwo):
        super().__init__()
        self.register_buffer("scale", powers.scale)
        self.bits = powers.bits

    def forward(self, values: Tensor) -> tuple[Tensor, None]:
        return fake_quantize_log_sqrt2(values, self.bits, self.scale), None
