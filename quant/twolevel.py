"""Two-level scales: integer group scales inside one floating scale per output channel (after Dai et al., VS-Quant, 2021).

A group's weights are ``step_o * k_og * (q - z_og)`` with integers k, q, z and ``|k (q - z)| <= 127``: a weight quantised in groups
expands exactly to int8, and its product with int8 activations stays one integer product per layer.
"""
import torch
from torch import Tensor

from quant.quantizer import Quantized, QuantSpec, grouped, quantize

LIMIT = 127  # of int8, symmetric
STEP_FACTORS = (0.9, 1.0, 1.07, 1.14, 1.22, 1.3)  # tried, of the step that just holds the channel's largest weight
SCALE_OFFSETS = (-1, 0, 1, 2)  # tried, from the integer scale just below the one that spans the group's range
BLOCK = 2 ** 18  # weights handled at a time: small enough to stay in a CPU's cache between passes


def quantize_weight(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Quantized:
    """Quantise a weight (O, I) by the convention of its spec; for ``importance`` see ``quantize_two_level``.

    Raises:
        ValueError: as ``quantize``.
    """
    return quantize_two_level(weight, spec, importance) if spec.convention == "two-level" else quantize(weight, spec)


def quantize_two_level(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Quantized:
    """Quantise a weight (O, I) in groups; every channel's step and every group's integer scale is the one of least error.

    Steps are bfloat16 values, so that they are stored as such.

    Args:
        importance: (I,) weights of the squared errors, such as the second moment of the inputs; None for all the same.

    Raises:
        ValueError: the weight holds NaN or infinity, or does not divide into groups.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("cannot quantise a tensor that holds NaN or infinity")
    groups, _ = grouped(weight, spec)  # (O, G, g)
    cost = torch.ones_like(groups[0]) if importance is None else importance.view_as(groups[0])
    blocks = [_quantize_rows(rows, cost, spec) for rows in groups.split(max(1, BLOCK // weight.shape[1]))]
    codes, scale, zero, step = (torch.cat(parts) for parts in zip(*blocks))
    return Quantized(codes.reshape(weight.shape), scale, zero, spec, step.reshape(-1, 1))


def _quantize_rows(groups: Tensor, cost: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (O, G, g) uint8, scale and zero (O, G, 1), step (O, 1, 1)."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)  # (O, G, 1)
    peak = torch.maximum(high, -low).amax(1, keepdim=True)  # (O, 1, 1)
    best = None
    for factor in STEP_FACTORS:
        step = (peak * (factor / LIMIT)).bfloat16().float()
        step.masked_fill_(step == 0, 1.0)
        below = ((high - low) / (step * spec.top)).floor()
        scales = torch.stack([(below + offset).clamp(1, LIMIT) for offset in SCALE_OFFSETS])  # (K, O, G, 1)
        errors = torch.stack([_error(groups, low, scale, step, cost, spec) for scale in scales])
        error, index = errors.min(0)
        found = step, scales.gather(0, index[None])[0], error.sum(1, keepdim=True)
        if best is None:
            best = found
        else:
            better = found[2] < best[2]  # (O, 1, 1)
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best))
    step, scale, _ = best
    zero = _zero(low, scale, step, spec)
    return _signed(groups, zero, scale, step, spec).add_(zero).to(torch.uint8), scale, zero, step


def _zero(low: Tensor, scale: Tensor, step: Tensor, spec: QuantSpec) -> Tensor:
    return (-low / (scale * step)).round_().clamp_(max=spec.top)


def _signed(groups: Tensor, zero: Tensor, scale: Tensor, step: Tensor, spec: QuantSpec) -> Tensor:
    """``q - z``, integer-valued, (O, G, g)."""
    bound = (LIMIT / scale).floor_()
    return (groups / (scale * step)).round_().clamp_(torch.maximum(-zero, -bound), torch.minimum(spec.top - zero, bound))


def _error(groups: Tensor, low: Tensor, scale: Tensor, step: Tensor, cost: Tensor, spec: QuantSpec) -> Tensor:
    """Weighted squared error of every group, (O, G, 1)."""
    fitted = _signed(groups, _zero(low, scale, step, spec), scale, step, spec).mul_(scale * step)
    return fitted.sub_(groups).square_().mul_(cost).sum(-1, keepdim=True)
