"""Which part does which job, for every choice that a recipe can make.

A new method is one file with a formula and a part, and a line here.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import config
from architectures.registry import architecture_of
from architectures.sites import Site
from config import Recipe
from quant.activations.softmax import fit_powers
from quant.activations.static import (
    DynamicRanges,
    EmbeddingRanges,
    FloatOperands,
    ReparameterisedRanges,
    StaticOperands,
    StaticRanges,
    static_activation,
    timestep_activation,
)
from quant.balancing.maxima import ChannelMaxima, aggregate, searched_steps
from quant.balancing.none import NoBalance
from quant.balancing.reparameterise import Reparameterisation
from quant.balancing.salience import Salience, complementary_shares, equal_shares
from quant.balancing.search import AlphaSearch, fastest
from quant.calibration.observers import (
    OperandSamples,
    Samples,
    StepOperandSamples,
    StepSamples,
    pick,
)
from quant.calibration.trajectory import Trajectory, joint_weight
from quant.calibration.watch import Balance, Watch
from quant.install import device_of
from quant.numerics.spec import QuantSpec
from quant.numerics.tokens import matrix
from quant.recipe import (
    BitWidths,
    act_spec,
    has_static_ranges,
    weighs_layers,
    weight_spec,
)
from quant.refinement.sensitivity import NoSensitivity, Sensitivity
from quant.streaming import moved
from quant.weights.floating import FloatWeights
from quant.weights.parts import LowRankFirst, SmoothFirst

WeightPart = SmoothFirst | LowRankFirst | FloatWeights

# What is found of a layer.
Found = TypeVar("Found")

# Observes a site's inputs, once for all parts that ask.
SamplesOf = Callable[[Site, Watch], Samples]

# Samples of attention's operands hold whole images, at least so many.
LEAST_OPERAND_IMAGES = 8


@dataclass(frozen=True)
class Task:
    """What is to be quantised, and how.

    Attributes:
        model: float; stays as it is.
        sites: of the recipe's scope.
        svd: the low-rank solver, a key of ``quant.weights.low_rank.SOLVERS``.
        device: where the model's inputs are, and all is computed; the model may lie elsewhere.
    """

    model: nn.Module
    sites: list[Site]
    recipe: Recipe
    bits: BitWidths
    svd: str
    device: torch.device

    def weight(self, linear: str) -> Tensor:
        """Return the float weight of a linear, (O, I) float32, on the device."""
        return matrix(self.model.get_submodule(linear), self.device)

    def beside_the_model(self, value: Found) -> Found:
        """Move what was found, a dataclass of tensors, to where the model lies."""
        return moved(value, device_of(self.model))

    @property
    def quantizes_first(self) -> bool:
        """Whether weights are quantised before the trajectory is seen."""
        return self.recipe.order == "lowrank-first" and not self.bits.leave_weights

    def act_spec(self, site: Site, group: int | None = None) -> QuantSpec:
        """Say how the input of a site is quantised."""
        return act_spec(self.recipe, self.bits.activations, site.per_image, group)


@dataclass(frozen=True)
class FirstPass:
    """What the first pass gave: the calls of the model, and per site maxima (steps, I).

    A recipe whose parts look at no data has neither.
    """

    trajectory: Trajectory | None
    maxima: dict[str, Tensor]

    def pick(self, count: int, recipe: Recipe) -> Tensor:
        """Draw images and steps (count, 2), as the recipe spreads them."""
        spread = "normal" if recipe.act_steps == "normal" else "uniform"
        return pick(len(self.trajectory), self.trajectory.images, count, spread)

    @property
    def step_tokens(self) -> int:
        """Count the tokens of a step that are looked at, where each has a range of its own."""
        return max(config.least_step_tokens, config.sample_tokens // len(self.trajectory))


@dataclass(frozen=True)
class Parts:
    """The parts of a recipe, one for each job."""

    balance: Balance
    weights: WeightPart
    activations: DynamicRanges | StaticRanges | EmbeddingRanges | ReparameterisedRanges
    operands: FloatOperands | StaticOperands
    sensitivity: NoSensitivity | Sensitivity

    def __iter__(self):
        return iter((
            self.balance, self.weights, self.activations, self.operands, self.sensitivity))


def build_weights(task: Task, maxima: dict[str, Tensor]) -> SmoothFirst | FloatWeights:
    """Build the part that quantises weights once their factors are known."""
    if task.bits.leave_weights:
        return FloatWeights(task.weight)
    return SmoothFirst(task.weight, task.recipe, task.bits.weights, maxima, task.svd)


def quantize_first(task: Task) -> LowRankFirst:
    """Quantise the weights before anything else, as the published code does."""
    return LowRankFirst(task.weight, task.sites, task.recipe, task.bits.weights, task.svd, progress)


def progress(sites: list[Site]) -> tqdm:
    """Show a bar around sites whose weights are quantised."""
    return tqdm(sites, desc="weights", unit="layer")


def build_parts(task: Task, weights: WeightPart, first: FirstPass) -> Parts:
    """Build the parts of a recipe that has a trajectory to look at."""
    samples_of = _shared_samples(task, first)
    balance = _balance(task, weights, first, samples_of)
    activations = _activations(task, first, samples_of, balance)
    sensitivity = Sensitivity(samples_of) if weighs_layers(task.recipe) else NoSensitivity()
    return Parts(balance, weights, activations, _operands(task, first), sensitivity)


def parts_without_trajectory(task: Task, weights: WeightPart) -> Parts:
    """Build the parts of a recipe that looks at nothing."""
    return Parts(
        NoBalance(), weights, DynamicRanges(task.act_spec), FloatOperands(), NoSensitivity())


def _shared_samples(task: Task, first: FirstPass) -> SamplesOf:
    """Make a function that observes a site's inputs, once for all parts that ask."""
    picks = first.pick(config.sample_images, task.recipe)
    tokens = config.sample_tokens // config.sample_images

    def samples_of(site: Site, watch: Watch) -> Samples:
        return watch.add(site.linears[0], Samples, lambda: Samples(picks, tokens))

    return samples_of


def _balance(task: Task, weights: WeightPart, first: FirstPass, samples_of: SamplesOf) -> Balance:
    recipe = task.recipe
    if recipe.balance == "salience":
        return Salience(partial(joint_weight, weight_of=task.weight), complementary_shares)
    if recipe.balance == "salience-equal":
        return Salience(partial(joint_weight, weight_of=task.weight), equal_shares)
    if recipe.balance == "reparameterise":
        spec = act_spec(recipe, task.bits.activations)
        return Reparameterisation(spec, recipe.act_clip, samples_of)
    if recipe.balance == "none":
        return NoBalance()
    magnitudes = {name: aggregate(values, recipe.balance, recipe.timestep)
                  for name, values in first.maxima.items()}
    new_search = partial(_new_search, task, weights)
    steps = searched_steps(recipe.search_steps, len(first.trajectory))
    return ChannelMaxima(magnitudes, recipe.alphas, weights.weight_of, new_search, steps)


def _new_search(task: Task, weights: WeightPart, name: str, factors: Tensor) -> AlphaSearch:
    linear = task.model.get_submodule(name)
    bias = None if linear.bias is None else linear.bias.float()
    spec = act_spec(task.recipe, task.bits.activations)
    return AlphaSearch(
        linear.weight.flatten(1), bias, factors, weight_spec(task.recipe, task.bits.weights), spec,
        weights.shared(name), fastest(task.device, spec))


def _activations(
    task: Task, first: FirstPass, samples_of: SamplesOf, balance: Balance
) -> DynamicRanges | StaticRanges | EmbeddingRanges | ReparameterisedRanges:
    if not has_static_ranges(task.recipe, task.bits):
        return DynamicRanges(task.act_spec)
    ranges = _static_ranges(task, first, samples_of)
    if isinstance(balance, Reparameterisation):
        return ReparameterisedRanges(task.act_spec, ranges, balance)
    return ranges


def _static_ranges(
    task: Task, first: FirstPass, samples_of: SamplesOf
) -> StaticRanges | EmbeddingRanges:
    recipe, timesteps = task.recipe, first.trajectory.timesteps

    def step_samples_of(site: Site, watch: Watch) -> StepSamples:
        return watch.add(site.linears[0], StepSamples, lambda: StepSamples(first.step_tokens))

    over_all = StaticRanges(
        task.act_spec, partial(static_activation, clip=recipe.act_clip), samples_of)
    per_step = StaticRanges(
        task.act_spec, partial(timestep_activation, clip=recipe.act_clip, timesteps=timesteps),
        step_samples_of)
    if recipe.act_steps == "each":
        return per_step
    if recipe.act_steps == "embedding":
        return EmbeddingRanges(per_step, over_all)
    return over_all


def _operands(task: Task, first: FirstPass) -> FloatOperands | StaticOperands:
    recipe, trajectory = task.recipe, first.trajectory
    if recipe.attention == "none" or not has_static_ranges(recipe, task.bits):
        return FloatOperands()
    attentions = architecture_of(task.model).attentions(task.model)
    spec = act_spec(recipe, task.bits.activations)
    if recipe.act_steps == "each":
        quantiser_of = partial(
            timestep_activation, spec=spec, clip=recipe.act_clip, timesteps=trajectory.timesteps)
        return StaticOperands(
            attentions, quantiser_of, quantiser_of, lambda: StepOperandSamples(first.step_tokens))
    quantiser_of = partial(static_activation, spec=spec, clip=recipe.act_clip)
    powers_of = partial(fit_powers, bits=spec.bits, choice=recipe.act_clip)
    probabilities_of = powers_of if recipe.attention == "log-sqrt2" else quantiser_of
    tokens = trajectory.tokens // trajectory.images
    images = max(LEAST_OPERAND_IMAGES, config.sample_tokens // tokens)
    picks = first.pick(images, recipe)
    return StaticOperands(
        attentions, quantiser_of, probabilities_of, lambda: OperandSamples(picks))


def observe(parts: Parts, sites: list[Site]) -> Watch:
    """Let every part ask for what it has to see of the replay."""
    watch = Watch()
    for site in sites:
        for part in parts:
            part.observe(site, watch)
    return watch
