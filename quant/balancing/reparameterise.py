"""Scale reparameterisation (RepQ-ViT, Li et al., 2023): a range per channel, run as one per tensor.

With scale and zero point (s, z) per channel and (t, y) for all,
``x / s + z = ((x + shift) / smooth) / t + y`` where ``smooth = s / t`` and ``shift = s (z - y)``:
the codes of ``(x + shift) / smooth`` under (t, y) are those of ``x`` under (s, z).
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from architectures.sites import Site
from quant.calibration.observers import Samples
from quant.calibration.watch import Watch
from quant.numerics.ranges import best_range, static_codes
from quant.numerics.smoothing import NO_SMOOTHING, Smoothing
from quant.numerics.spec import QuantSpec


@dataclass(frozen=True)
class Reparameterized:
    """The change ``(x + shift) / smooth`` of an input, and its static quantiser afterwards.

    Attributes:
        smooth, shift: (I,) float32.
        scale, zero: 0-dim float32, as ``quant.numerics.ranges.static_codes`` takes them; ``zero``
            is one of the codes.
    """

    smooth: Tensor
    shift: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class PerChannel:
    """The quantiser of channels that is then reparameterised, as a ``RangedQuantizer``.

    Parameters are scale and integer-valued zero point. Ranges are not widened to include 0, and
    zero points need not be codes: an offset of a channel is free, it becomes part of the shift. A
    channel of one constant value gets the mean scale of the others, so as not to move it.
    """

    spec: QuantSpec

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = (high - low) / self.spec.top
        live = scale > 0
        mean = scale[live].mean() if live.any() else torch.ones_like(scale)
        scale = torch.where(live, scale, mean)
        return scale, (low / scale).neg_().round_()

    def round_trip(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return static_codes(x, scale, zero, self.spec).mul_(scale)


def channel_ranges(sample: Tensor, spec: QuantSpec, choice: str) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point of every channel, (I,) each, for a sample of inputs (..., I).

    Args:
        choice: a key of ``quant.numerics.ranges.RANGES``. ``minmax`` is the paper's formula, and
            recipe ``repq-vit``'s; its code takes the best of three ``percentile``s.

    Raises:
        ValueError: NaN or infinity, or an unknown choice.
    """
    rows = sample.flatten(0, -2).float()  # (n, I)
    scale, zero = best_range(rows, (0,), PerChannel(spec), choice)
    return scale.squeeze(0), zero.squeeze(0)


def reparameterize(scale: Tensor, zero: Tensor, spec: QuantSpec) -> Reparameterized:
    """Replace scales and zero points of channels (I,) by their means, and find the factors for it.

    Any integer serves as the zero point, so the mean is rounded and kept inside the codes. The
    published code does neither, and a zero point that is not an integer moves the codes.
    """
    mean = scale.mean()
    center = zero.mean().round().clamp(0, spec.top)
    return Reparameterized(
        smooth=scale / mean,
        shift=scale * (zero - center),
        scale=mean,
        zero=center,
    )


class Reparameterisation:
    """The balance of RepQ-ViT, for sites that follow a LayerNorm. It finds their ranges as well.

    Args:
        spec: of the activations.
        clip: how the channels' ranges are chosen, a key of ``quant.numerics.ranges.RANGES``.
        samples_of: the observer of a site's inputs, which static ranges share.
    """

    def __init__(self, spec: QuantSpec, clip: str, samples_of: Callable[[Site, Watch], Samples]):
        self._spec = spec
        self._clip = clip
        self._samples_of = samples_of
        self._samples: dict[str, Samples] = {}
        self.found: dict[str, Reparameterized] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for samples of the inputs."""
        if site.is_balanced and site.follows_norm:
            self._samples[site.name] = self._samples_of(site, watch)

    def finish(self, site: Site) -> Smoothing:
        """Return factors and shift of a site; ``found`` then holds its range."""
        if site.name not in self._samples:
            return NO_SMOOTHING
        ranges = channel_ranges(self._samples[site.name].value, self._spec, self._clip)
        self.found[site.name] = reparameterize(*ranges, self._spec)
        return Smoothing(self.found[site.name].smooth, self.found[site.name].shift)
