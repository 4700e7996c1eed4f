"""What the parts of a recipe see of a replay, and what a part is."""
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

from architectures.sites import Site
from quant.numerics.smoothing import Smoothing

# Called with a linear's input (K, N, T, I) and output (K, N, T, O) for K steps at a time. The
# observer of an attention is called with its queries, keys and values instead.
Observer = Callable[..., None]
Kind = TypeVar("Kind", bound=Observer)


class Watch:
    """The observers of one replay. Parts that ask for the same thing share one observer."""

    def __init__(self):
        self._observers: dict[str, dict[Hashable, Observer]] = {}

    def add(self, module: str, key: Hashable, make: Callable[[], Kind]) -> Kind:
        """Return the observer of a module that is known as ``key``; ``make`` it if it is new."""
        observers = self._observers.setdefault(module, {})
        if key not in observers:
            observers[key] = make()
        return observers[key]

    def of(self, module: str) -> list[Observer]:
        """List the observers of a module, a linear or an attention, by its name."""
        return list(self._observers.get(module, {}).values())

    @property
    def modules(self) -> list[str]:
        """Name the modules that have observers."""
        return list(self._observers)


class Part(Protocol):
    """One choice of a recipe: what it has to see of the trajectory, and what it makes of that."""

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for observers. Called once per site, before the trajectory is replayed."""


class Balance(Part, Protocol):
    """The part that moves outliers from activations into weights."""

    def finish(self, site: Site) -> Smoothing:
        """Return the factors of a site. Called once per site, after the replay."""
