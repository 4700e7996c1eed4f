"""What quantisation has to know of a diffusion transformer.

Only this folder names a model's modules. Everything else works on sites.
"""
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# The arguments of one call of a module, by name.
Call = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """A place that divides an activation: its channels are output channels of a linear.

    They are those from ``start`` up to ``stop``, all of them by default. The first of them is the
    activation's channel ``channel``.
    """

    linear: str
    start: int = 0
    stop: int | None = None
    channel: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Modulation:
    """A place that divides an activation ``norm(x) (1 + scale) + shift``.

    The output of ``linear`` consists of chunks as wide as the activation. ``shift`` and ``scale``
    are the numbers of two of them; ``shift`` is None where nothing is added.
    """

    linear: str
    shift: int | None
    scale: int


@dataclass(frozen=True)
class SharedModulation:
    """A place that divides ``norm(x) (1 + scale) + shift`` where one linear serves all blocks.

    Every block adds its own ``table`` (chunks, D) to the shared vector (N, chunks D). The table is
    divided; the vector is divided on its way into ``block``, as its ``argument``. ``table`` is None
    where blocks have none: then ``(1 + scale) / s - 1`` is made of the vector itself.
    """

    table: str | None
    shift: int | None
    scale: int
    block: str
    argument: str


@dataclass(frozen=True)
class Entries:
    """A place that divides an activation: entries of a parameter, such as a norm's weight.

    They are those from ``start`` up to ``stop`` of the flattened ``parameter``. ``is_scale`` says
    that they are the scale of ``1 + scale``.
    """

    parameter: str
    start: int
    stop: int
    is_scale: bool = False


Fold = Rows | Modulation | SharedModulation | Entries


def place_of(fold: Fold, block: str) -> str:
    """Name what a fold changes, from the block on."""
    if isinstance(fold, SharedModulation):
        return f"argument {fold.argument}"
    name = fold.parameter if isinstance(fold, Entries) else fold.linear
    return name.removeprefix(f"{block}.")


@dataclass(frozen=True)
class Site:
    """Linears that read one activation, so that they share one smoothing factor.

    Attributes:
        name: unique; with a single linear, that linear's.
        linears: by state-dict name.
        role: what tables and figures call it: ``qkv``, ``proj``, ``fc1``, ``fc2``, …
        block: the name of its block; None outside the blocks.
        folds: every place where the factor has to be divided out; empty: the linears divide their
            input themselves.
        per_image: its input is a vector per image, computed from timestep and condition alone.
    """

    name: str
    linears: tuple[str, ...]
    role: str
    block: str | None = None
    folds: tuple[Fold, ...] = ()
    per_image: bool = False

    @property
    def is_balanced(self) -> bool:
        """Whether outliers can be moved from its activation into its weights."""
        return self.block is not None and not self.per_image

    @property
    def pattern(self) -> str:
        """Its name, alike in all blocks of a list."""
        if self.block is None:
            return self.name
        blocks = self.block.rpartition(".")[0]
        return f"{blocks}.*.{self.name.removeprefix(f'{self.block}.')}"

    @property
    def follows_norm(self) -> bool:
        """Whether its activation comes from a modulated LayerNorm with a shift.

        Where entries of a parameter are divided, too, nobody knows which of them shift.
        """
        modulations = [place for place in self.folds
                       if isinstance(place, Modulation | SharedModulation)]
        entries = any(isinstance(place, Entries) for place in self.folds)
        shifts = all(place.shift is not None for place in modulations)
        return bool(modulations) and shifts and not entries


@dataclass(frozen=True)
class AttentionSite:
    """An attention whose operands can be quantised.

    Attributes:
        name: of the module inside which ``scaled_dot_product_attention`` is called, once.
        output: the name of the site that reads the averaged values.
    """

    name: str
    output: str


# The entrance of a unit that starts from what the model itself is called with.
MODEL = ""


@dataclass(frozen=True)
class Unit:
    """Layers that are reconstructed together: their rounding is learned from what they compute.

    Attributes:
        name: what it is called.
        linears: its layers, by state-dict name.
        entrance: the module whose calls ``run`` takes; ``MODEL`` for the model's own.
        run: computes what is compared, given the model that holds the layers and a call of the
            entrance: outputs with an entry per image.
        attentions: inside it, by the name of the module.
        advance: turns a call and its output into the call of the unit that follows; None where
            that has to be recorded.
    """

    name: str
    linears: tuple[str, ...]
    entrance: str
    run: Callable[[nn.Module, Call], tuple[Tensor, ...]]
    attentions: tuple[str, ...] = ()
    advance: Callable[[Call, Tensor], Call] | None = None


class Architecture(Protocol):
    """A family of transformers.

    Attributes:
        name: in checkpoints.
        batched: arguments of the model with an entry per image, tensors or dicts of them; others
            are the same for all.
        clock: the argument of the model that holds the timestep of every image, or one for all;
            empty: none does.
    """

    name: str
    batched: tuple[str, ...]
    clock: str

    def sites(self, model: nn.Module, scope: str) -> list[Site]:
        """List all that a scope quantises, in the order in which a forward pass meets it.

        ``blocks`` holds the linears of attention and MLP, ``adaln`` the blocks' modulation too,
        ``all`` every linear and the patch embedding, ``inner`` all but this one and the last.
        """

    def blocks(self, model: nn.Module) -> list[str]:
        """Name the transformer blocks in forward order."""

    def advance(self, call: Call, output: Tensor) -> Call:
        """Return the next block's call, given a block's call and what it returned.

        None in the place of this method: the next block's call has to be recorded.
        """

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        """List the attentions of all blocks in forward order."""

    def temporal(self, model: nn.Module) -> list[str]:
        """Name the linears that ``run_temporal`` runs; none: the model does not allow it."""

    def run_temporal(self, model: nn.Module, call: Call) -> tuple[Tensor, ...]:
        """Compute all that timestep and condition alone decide, (N, ...) each."""

    def output_units(self, model: nn.Module) -> list[Unit]:
        """List the units behind the blocks."""

    def configuration(self, model: nn.Module) -> dict[str, Any]:
        """Return what ``build`` needs to make a model of the same shape; JSON-able."""

    def build(self, configuration: dict[str, Any]) -> nn.Module:
        """Make a model with random weights.

        Raises:
            ValueError: the configuration is not one of this architecture.
        """


def single(
    linear: str, role: str, block: str | None, *folds: Fold, per_image: bool = False
) -> Site:
    """Describe a linear that reads an activation of its own."""
    return Site(linear, (linear,), role, block, folds, per_image)


def call_of(module: nn.Module, args: tuple, kwargs: dict) -> Call:
    """Give the arguments of a module's ``forward`` their names."""
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def timesteps_of(call: Call, clock: str) -> Tensor:
    """Return the timesteps of a call, (N,), or (1,) of one for all; without a clock a 0."""
    return torch.as_tensor(call.get(clock, 0)).reshape(-1)


def inside(place: str, *ends: str) -> tuple[str, ...]:
    """Name several modules of one place."""
    return tuple(f"{place}.{end}" for end in ends)


def linears_of(sites: list[Site]) -> list[str]:
    """Name the linears of several sites, in their order."""
    return [name for site in sites for name in site.linears]


def per_image_linears(sites: list[Site]) -> list[str]:
    """Name the linears that read a vector per image."""
    return linears_of([site for site in sites if site.per_image])


def without_ends(sites: list[Site]) -> list[Site]:
    """Drop the patch embedding and the last linear."""
    return [site for site in sites if site.role not in ("patches", "output")]


def modulations(sites: list[Site]) -> list[Site]:
    """Pick the sites that give the blocks' LayerNorms their shift and scale."""
    return [site for site in sites if site.role == "modulation"]
