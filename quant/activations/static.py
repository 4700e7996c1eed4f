"""The parts that find how activations are quantised: in every call, or once on calibration data."""
from collections.abc import Callable

from torch import Tensor

from architectures.sites import AttentionSite, Site
from quant.activations.attention import Operands, attention_probabilities, by_head
from quant.activations.quantisers import Activation
from quant.activations.softmax import PowersOfRootTwo, fit_powers
from quant.balancing.reparameterise import Reparameterisation
from quant.calibration.observers import OperandSamples, Samples, StepRange
from quant.calibration.watch import Watch
from quant.numerics.ranges import tensor_range
from quant.numerics.smoothing import Smoothing
from quant.numerics.uniform import QuantSpec, scale_and_zero

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


class StaticRanges:
    """A range per site, found once on samples of its input.

    Args:
        clip: how a range is chosen, a key of ``quant.numerics.ranges.RANGES``.
        samples_of: the observer of a site's inputs, which other parts may share.
    """

    def __init__(self, spec_of: SpecOf, clip: str, samples_of: Callable[[Site, Watch], Samples]):
        self._spec_of = spec_of
        self._clip = clip
        self._samples_of = samples_of
        self._samples: dict[str, Samples] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for samples of the input."""
        self._samples[site.name] = self._samples_of(site, watch)

    def finish(self, site: Site, smoothing: Smoothing, group: int | None) -> Activation:
        """Find the range of a site's input, as the balance leaves it."""
        spec = self._spec_of(site, group)
        inputs = smoothing.of_input(self._samples[site.name].value)
        return Activation(spec, *tensor_range(inputs, spec, self._clip))


class TimestepRanges(StaticRanges):
    """TFMQ-DM: what the timestep embedding alone decides has a range per timestep.

    Args:
        timesteps: (steps,) of the trajectory.
    """

    def __init__(
        self,
        spec_of: SpecOf,
        clip: str,
        samples_of: Callable[[Site, Watch], Samples],
        timesteps: Tensor,
    ):
        super().__init__(spec_of, clip, samples_of)
        self._timesteps = timesteps
        self._ranges: dict[str, StepRange] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for ranges per step of a vector per image, for samples of other inputs."""
        if not site.per_image:
            super().observe(site, watch)
            return
        self._ranges[site.name] = watch.add(site.linears[0], StepRange, StepRange)

    def finish(self, site: Site, smoothing: Smoothing, group: int | None) -> Activation:
        """Find the range, or the ranges, of a site's input."""
        if site.name not in self._ranges:
            return super().finish(site, smoothing, group)
        spec, seen = self._spec_of(site, group), self._ranges[site.name]
        return Activation(spec, *scale_and_zero(seen.low, seen.high, spec), self._timesteps)


class ReparameterisedRanges:
    """RepQ-ViT: the range of a balanced site comes out of its balance.

    Args:
        others: finds the ranges of all other sites.
        balance: has finished the site before.
    """

    def __init__(self, spec_of: SpecOf, others: StaticRanges, balance: Reparameterisation):
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
    """Ranges of attention's operands, found once on samples of whole images.

    Args:
        attentions: of the model.
        spec: of every operand.
        clip: how a range is chosen, a key of ``quant.numerics.ranges.RANGES``.
        probabilities: how the softmax output is quantised: ``uniform`` or ``log-sqrt2``.
        new_samples: makes an observer of operands.
    """

    def __init__(
        self,
        attentions: list[AttentionSite],
        spec: QuantSpec,
        clip: str,
        probabilities: str,
        new_samples: Callable[[], OperandSamples],
    ):
        self._by_output = {attention.output: attention for attention in attentions}
        self._spec = spec
        self._clip = clip
        self._probabilities = probabilities
        self._new_samples = new_samples
        self._samples: dict[str, OperandSamples] = {}

    def observe(self, site: Site, watch: Watch) -> None:
        """Ask for the operands of the attention whose values the site reads."""
        if site.name in self._by_output:
            attention = self._by_output[site.name].name
            self._samples[site.name] = watch.add(attention, OperandSamples, self._new_samples)

    def finish(self, smoothing: dict[str, Smoothing]) -> dict[str, Operands]:
        """Find the quantisers of every attention, given the smoothing of each site.

        Raises:
            ValueError: an attention never multiplied where its operands can be seen.
        """
        operands = {}
        for output, samples in self._samples.items():
            name = self._by_output[output].name
            if samples.is_empty:
                raise ValueError(
                    f"attention {name} never called scaled_dot_product_attention, where its "
                    "operands are quantised: let it (timm's does under TIMM_FUSED_ATTN=1), or give "
                    "--attention none")
            operands[name] = self._operands(samples, smoothing[output])
        return operands

    def _operands(self, samples: OperandSamples, smoothing: Smoothing) -> Operands:
        query, key, value = samples.value  # (P, T, D) each
        probabilities = attention_probabilities(
            by_head(query, samples.heads), by_head(key, samples.heads))
        return Operands(
            query=self._uniform(query),
            key=self._uniform(key),
            value=self._uniform(smoothing.of_input(value)),
            probabilities=self._of_probabilities(probabilities),
            factors=smoothing.factors)

    def _uniform(self, sample: Tensor) -> Activation:
        return Activation(self._spec, *tensor_range(sample, self._spec, self._clip))

    def _of_probabilities(self, sample: Tensor) -> Activation | PowersOfRootTwo:
        if self._probabilities == "uniform":
            return self._uniform(sample)
        return fit_powers(sample, self._spec.bits, self._clip)
