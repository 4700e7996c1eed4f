"""The parts that find how activations are quantised: in every call, or once on calibration data."""
from collections.abc import Callable

from torch import Tensor

from architectures.sites import AttentionSite, Site
from errors import Setting, SettingError
from quant.activations.attention import Operands
from quant.activations.quantisers import Activation
from quant.activations.softmax import PowersOfRootTwo
from quant.balancing.reparameterise import Reparameterisation
from quant.calibration.observers import (
    OperandSamples,
    Samples,
    StepOperandSamples,
    StepSamples,
)
from quant.calibration.watch import Watch
from quant.numerics.ranges import step_ranges, tensor_range
from quant.numerics.smoothing import Smoothing
from quant.numerics.spec import QuantSpec

# How the input of a site is quantised, given the size of its groups (None: the recipe's).
SpecOf = Callable[[Site, int | None], QuantSpec]


class DynamicRanges:
    """Ranges that are measured in every call: nothing to find."""

    def __init__(self, spec_of: SpecOf):
        self._spec_of = spec_of

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for nothing."""

    def finish(self, site: Site, smoothing: Smoothing, group: int | None) -> Activation:
        """Return the quantiser of a site's input."""
        return Activation(self._spec_of(site, group))


def static_activation(sample: Tensor, spec: QuantSpec, clip: str) -> Activation:
    """Choose one range for a sample of any shape; ``clip`` is one of ``TENSOR_RANGES``."""
    return Activation(spec, *tensor_range(sample, spec, clip))


def timestep_activation(
    samples: Tensor, spec: QuantSpec, clip: str, timesteps: Tensor
) -> Activation:
    """Choose a range for each of the timesteps (steps,), given samples (steps, ...)."""
    return Activation(spec, *step_ranges(samples, spec, clip), timesteps)


class StaticRanges:
    """Ranges of a site's input that are found once, on samples of it.

    Args:
        quantiser_of: chooses the range for samples, or the ranges.
        samples_of: the observer of a site's inputs, which other parts may share.
    """

    def __init__(
        self,
        spec_of: SpecOf,
        quantiser_of: Callable[[Tensor, QuantSpec], Activation],
        samples_of: Callable[[Site, Watch], Samples | StepSamples],
    ):
        self._spec_of = spec_of
        self._quantiser_of = quantiser_of
        self._samples_of = samples_of
        self._samples: dict[str, Samples | StepSamples] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for samples of the input."""
        self._samples[site.name] = self._samples_of(site, watch)

    def finish(self, site: Site, smoothing: Smoothing, group: int | None) -> Activation:
        """Find the range of a site's input, as the balance leaves it."""
        inputs = smoothing.of_input(self._samples[site.name].value)
        return self._quantiser_of(inputs, self._spec_of(site, group))


class EmbeddingRanges:
    """TFMQ-DM: what timestep and condition alone decide has ranges of its own kind.

    Args:
        embeddings: finds the ranges of sites that read a vector per image.
        others: finds those of all others.
    """

    def __init__(self, embeddings: StaticRanges, others: StaticRanges):
        self._embeddings = embeddings
        self._others = others

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for what the site's ranges need."""
        self._part(site).observe(site, watch)

    def finish(self, site: Site, smoothing: Smoothing, group: int | None) -> Activation:
        """Find the range, or the ranges, of a site's input."""
        return self._part(site).finish(site, smoothing, group)

    def _part(self, site: Site) -> StaticRanges:
        return self._embeddings if site.per_image else self._others


class ReparameterisedRanges:
    """RepQ-ViT: the range of a balanced site comes out of its balance.

    Args:
        others: finds the ranges of all other sites.
        balance: has finished the site before.
    """

    def __init__(
        self,
        spec_of: SpecOf,
        others: StaticRanges | EmbeddingRanges,
        balance: Reparameterisation,
    ):
        self._spec_of = spec_of
        self._others = others
        self._balance = balance

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for what the ranges of other sites need."""
        self._others.observe(site, watch)

    def finish(self, site: Site, smoothing: Smoothing, group: int | None) -> Activation:
        """Take the range over from the balance, or find it."""
        if site.name not in self._balance.found:
            return self._others.finish(site, smoothing, group)
        static = self._balance.found[site.name]
        return Activation(self._spec_of(site, group), static.scale, static.zero)


class FloatOperands:
    """Attention whose operands stay as they are."""

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for nothing."""

    def finish(self, smoothing: dict[str, Smoothing]) -> dict[str, Operands]:
        """Return no quantisers."""
        return {}


class StaticOperands:
    """Ranges of attention's operands that are found once, on samples of them.

    Args:
        attentions: of the model.
        quantiser_of: chooses the range, or the ranges, of queries, keys or values.
        probabilities_of: the same for the softmax output, or powers of the square root of 2.
        new_samples: makes an observer of operands.
    """

    def __init__(
        self,
        attentions: list[AttentionSite],
        quantiser_of: Callable[[Tensor], Activation],
        probabilities_of: Callable[[Tensor], Activation | PowersOfRootTwo],
        new_samples: Callable[[], OperandSamples | StepOperandSamples],
    ):
        self._by_output = {attention.output: attention for attention in attentions}
        self._quantiser_of = quantiser_of
        self._probabilities_of = probabilities_of
        self._new_samples = new_samples
        self._samples: dict[str, OperandSamples | StepOperandSamples] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for the operands of the attention whose values the site reads."""
        if site.name in self._by_output:
            attention = self._by_output[site.name].name
            self._samples[site.name] = watch.add(attention, StaticOperands, self._new_samples)

    def finish(self, smoothing: dict[str, Smoothing]) -> dict[str, Operands]:
        """Find the quantisers of every attention, given the smoothing of each site.

        Raises:
            ValueError: an attention never multiplied where its operands can be seen.
        """
        operands = {}
        for output, samples in self._samples.items():
            name = self._by_output[output].name
            if samples.is_empty:
                raise SettingError(
                    f"attention {name} never called scaled_dot_product_attention, where its "
                    "operands are quantised: let it, or give ", Setting("attention", "none"))
            operands[name] = self._operands(samples, smoothing[output])
        return operands

    def _operands(
        self, samples: OperandSamples | StepOperandSamples, smoothing: Smoothing
    ) -> Operands:
        query, key, value, probabilities = samples.value
        return Operands(
            query=self._quantiser_of(query),
            key=self._quantiser_of(key),
            value=self._quantiser_of(smoothing.of_input(value)),
            probabilities=self._probabilities_of(probabilities),
            factors=smoothing.factors)
