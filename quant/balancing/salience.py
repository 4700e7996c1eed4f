"""Salience balancing: factors from channel magnitudes over time (PTQ4DiT, Wu et al., 2024)."""
from collections.abc import Callable

import torch
from torch import Tensor

import config
from architectures.sites import Site
from quant.calibration.observers import ImageMaxima
from quant.calibration.watch import Watch
from quant.numerics.smoothing import NO_SMOOTHING, Smoothing

# Of rows (S, I) and a weight's magnitudes (I,), what each row counts: (S,), of sum 1.
SharesOf = Callable[[Tensor, Tensor], Tensor]


def salience_factors(act: Tensor, weight: Tensor, floor: float, shares_of: SharesOf) -> Tensor:
    """Compute ``s_j = sqrt(a_j / w_j)``, (I,) float32: channel-wise salience balancing.

    ``x / s`` and ``W diag(s)`` then have the same salience ``sqrt(a_j w_j)`` in each channel. ``a``
    is a mean of the rows of ``act``.

    Args:
        act: (S, I), largest magnitude of every input channel, one row per sample and timestep.
        weight: (O, I); ``w_j`` is its largest magnitude in column j.
        floor: the least that ``a`` and ``w`` are taken to be in the quotient.
        shares_of: how much each row counts in the mean.
    """
    w = weight.abs().amax(0)  # (I,)
    share = shares_of(act, w).to(act.dtype)  # (S,)
    a = share @ act  # (I,)
    return (a.clamp(min=floor) / w.clamp(min=floor)).sqrt()


def complementary_shares(act: Tensor, w: Tensor) -> Tensor:
    """Favour rows that are large where the weight is small: salience calibration.

    Row t counts ``softmax(-rho_t)``, where rho_t is Spearman's correlation over channels with
    ``w``.
    """
    return torch.softmax(-spearman(act, w), 0)


def equal_shares(act: Tensor, w: Tensor) -> Tensor:
    """Let every row count the same: balancing without salience calibration."""
    return torch.full_like(act[:, 0], 1 / len(act))


def spearman(rows: Tensor, other: Tensor) -> Tensor:
    """Compute Spearman's rank correlation of each row (S, I) with ``other`` (I,).

    Returns:
        (S,) float64; 0 where a side is constant, and so has no ranks.
    """
    a = _centered_ranks(rows)  # (S, I)
    b = _centered_ranks(other)  # (I,)
    length = a.norm(dim=-1) * b.norm()
    return (a @ b) / torch.where(length > 0, length, 1.0)


def _centered_ranks(values: Tensor) -> Tensor:
    """Rank along the last dimension, float64, less the mean rank; ties share the mean of theirs."""
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - values.shape[-1]).double() / 2


class Salience:
    """The balance of PTQ4DiT. It leaves sites alone whose factor cannot be folded away (fc2).

    Args:
        weight_of: the float weight (O, I) of a site.
        shares_of: how much the inputs of each image and timestep count.
    """

    def __init__(self, weight_of: Callable[[Site], Tensor], shares_of: SharesOf):
        self._weight_of = weight_of
        self._shares_of = shares_of
        self._maxima: dict[str, ImageMaxima] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for the maxima of every image."""
        if site.is_balanced and site.folds:
            self._maxima[site.name] = watch.add(site.linears[0], ImageMaxima, ImageMaxima)

    def finish(self, site: Site) -> Smoothing:
        """Return the factors of a site."""
        if site.name not in self._maxima:
            return NO_SMOOTHING
        maxima = self._maxima[site.name].value  # (steps * N, I)
        factors = salience_factors(
            maxima, self._weight_of(site), config.factor_floor, self._shares_of)
        return Smoothing(factors)
