"""Scale reparameterisation: one activation range per channel at the price of one per tensor (RepQ-ViT, Li et al., 2023).

With scale and zero point (s, z) per channel and (t, y) for all, ``x / s + z = ((x + shift) / smooth) / t + y`` where
``smooth = s / t`` and ``shift = s (z - y)``: the codes of ``(x + shift) / smooth`` under (t, y) are those of ``x`` under (s, z).
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.quantizer import QuantSpec


@dataclass(frozen=True)
class Reparameterized:
    """The input ``(x + shift) / smooth`` and its static quantiser (see ``quant.ranges.static_codes``).

    Attributes:
        smooth, shift: (I,) float32.
        scale, zero: 0-dim float32; ``zero`` is one of the codes.
    """

    smooth: Tensor
    shift: Tensor
    scale: Tensor
    zero: Tensor


def channel_quantizer(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and integer-valued zero point of every channel, (I,), from its minimum and maximum (I,).

    The published code cuts channels at percentiles; here they keep what calibration has seen.

    Ranges are not widened to include 0, and zero points need not be codes: what a channel is off 0 costs nothing here, it becomes
    shift. A channel of one constant value gets the mean scale of the others, so as not to move it.
    """
    scale = (high - low) / spec.top
    live = scale > 0
    scale = torch.where(live, scale, scale[live].mean() if live.any() else torch.ones_like(scale))
    return scale, (low / scale).neg_().round_()


def reparameterize(scale: Tensor, zero: Tensor, spec: QuantSpec) -> Reparameterized:
    """One scale and zero point for all channels, the means of theirs (I,), and the factors that go with them.

    Any integer serves as the zero point, so the mean is rounded and kept inside the codes; the published code does neither, and
    a zero point that is not an integer moves the codes.
    """
    mean, centre = scale.mean(), zero.mean().round().clamp(0, spec.top)
    return Reparameterized(scale / mean, scale * (zero - centre), mean, centre)
