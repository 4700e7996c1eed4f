"""Channel maxima to smoothing factors: TAS (DiTAS, section 4), SmoothQuant (Xiao et al., 2023).

TAS is temporal-aggregated smoothing: a channel's magnitude is its maximum over all steps.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import config
from architectures.sites import Site
from quant.balancing.search import AlphaSearch
from quant.calibration.observers import FirstSteps
from quant.calibration.watch import Watch
from quant.numerics.smoothing import NO_SMOOTHING, Smoothing

# The published search sums its losses over this many steps of any longer trajectory.
PUBLISHED_SEARCH_STEPS = 50


def aggregate(absmax: Tensor, balance: str, timestep: int) -> Tensor:
    """Reduce channel maxima per sampling step (steps, I) to channel magnitudes ``a`` (I,).

    Args:
        balance: ``tas`` takes the maximum over all steps, ``smoothquant`` those of one step.
        timestep: that step's index in the order of sampling: 0 is the noisiest, negative ones
            count from the end.
    """
    return absmax.amax(0) if balance == "tas" else absmax[timestep]


def smoothing_factors(act: Tensor, weight: Tensor, alpha: float, floor: float) -> Tensor:
    """Compute ``s_j = max(a_j^alpha / w_j^(1 - alpha), floor)``, (I,) (SmoothQuant, eq. 4).

    Args:
        act: ``a`` (I,), channel magnitudes of the activation.
        weight: (O, I); ``w_j`` is its largest magnitude in column j.
        alpha: migration strength in [0, 1].
        floor: the least that ``a``, ``w`` and the factors are taken to be.
    """
    a = act.clamp(min=floor)
    w = weight.abs().amax(0).clamp(min=floor)
    return (a.pow(alpha) / w.pow(1 - alpha)).clamp(min=floor)


def check_step(timestep: int, steps: int) -> None:
    """Raise a ``ValueError`` unless ``timestep`` is an index of a trajectory of ``steps`` steps."""
    if not -steps <= timestep < steps:
        raise ValueError(
            f"timestep index {timestep} is outside a trajectory of {steps} steps: "
            f"expected 0 to {steps - 1}"
        )


def searched_steps(choice: str, steps: int) -> int:
    """Count the steps, noisiest first, whose losses a search sums in a trajectory of ``steps``.

    Args:
        choice: ``all``, or ``published``: at most ``PUBLISHED_SEARCH_STEPS``.
    """
    return min(steps, PUBLISHED_SEARCH_STEPS) if choice == "published" else steps


class ChannelMaxima:
    """The balance of TAS and SmoothQuant: factors from channel maxima.

    Of several migration strengths the one of least loss is taken; a single one needs no search.

    Args:
        magnitudes: per site, ``a`` (I,): over all steps (TAS), or at one (SmoothQuant).
        alphas: migration strengths to try.
        weight_of: the weight (O, I) whose magnitudes count; the published order measures the
            quantised weight, ours the float one.
        new_search: makes the search of one of a site's linears, given factors (A, I).
        steps: how many steps, noisiest first, a search looks at.
    """

    def __init__(
        self,
        magnitudes: dict[str, Tensor],
        alphas: tuple[float, ...],
        weight_of: Callable[[Site], Tensor],
        new_search: Callable[[str, Tensor], AlphaSearch],
        steps: int,
    ):
        self._magnitudes = magnitudes
        self._alphas = alphas
        self._weight_of = weight_of
        self._new_search = new_search
        self._steps = steps
        self._candidates: dict[str, Tensor] = {}
        self._searches: dict[str, list[AlphaSearch]] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Prepare every candidate, and a search of their losses on each linear of the site."""
        if not site.is_balanced:
            return
        magnitude, weight = self._magnitudes[site.name], self._weight_of(site)
        candidates = torch.stack([
            smoothing_factors(magnitude, weight, alpha, config.factor_floor)
            for alpha in self._alphas
        ])
        self._candidates[site.name] = candidates
        if len(self._alphas) > 1:
            self._searches[site.name] = [
                self._watched_search(name, candidates, watch) for name in site.linears
            ]

    def _watched_search(self, name: str, candidates: Tensor, watch: Watch) -> AlphaSearch:
        search = self._new_search(name, candidates)
        watch.add(name, AlphaSearch, partial(FirstSteps, search, self._steps))
        return search

    def finish(self, site: Site) -> Smoothing:
        """Return the factors of least loss, summed over the linears of the site."""
        if site.name not in self._candidates:
            return NO_SMOOTHING
        candidates = self._candidates[site.name]
        if site.name not in self._searches:
            return Smoothing(candidates[0], alpha=self._alphas[0])
        losses = torch.stack([search.loss for search in self._searches[site.name]]).sum(0)
        best = int(losses.argmin())
        return Smoothing(candidates[best], alpha=self._alphas[best], losses=losses)
