"""The log-sqrt2 quantiser of attention probabilities (RepQ-ViT, Li et al., 2023)."""
import torch
from torch import Tensor


def fake_quantize_log_sqrt2(p: Tensor, bits: int) -> Tensor:
    """The nearest power of sqrt(2) in the log domain: ``2^(-q/2)`` with ``q = round(-2 log2 p)``, at least 0.

    What needs a code above ``2^bits - 1`` becomes 0, as in the published code; so there are ``2^bits + 1`` values, and 0 is not a code.

    Args:
        p: probabilities of any shape and floating type, which the result shares; 0 stays 0, NaN stays NaN.
    """
    codes = p.float().log2().mul_(-2).round_().clamp_(min=0)
    return torch.where(codes >= 2 ** bits, 0.0, torch.exp2(codes / -2)).to(p.dtype)
