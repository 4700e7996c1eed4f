"""What a recipe learns from the calibration trajectory, and the quantised layers that follow from it."""
import hashlib
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import config
from architectures.dit import block_linears, timed
from config import Recipe
from quant.activations.attention import Operands, softmax_of
from quant.activations.quantisers import Activation
from quant.activations.softmax import fit_powers
from quant.balancing.maxima import aggregate, smoothing_factors
from quant.balancing.reparameterise import Reparameterized, channel_ranges, reparameterize
from quant.balancing.salience import salience_factors
from quant.balancing.search import AlphaSearch, fastest
from quant.calibration.observers import ImageMaxima, Samples, SecondMoment, StepRange, pick
from quant.calibration.trajectory import Trajectory, replay
from quant.install import install
from quant.layers.quantised import QuantizedLayer
from quant.numerics.ranges import tensor_range
from quant.numerics.tokens import matrix
from quant.numerics.uniform import OFF_BITS, scale_and_zero
from quant.recipe import act_spec, weight_spec
from quant.refinement import evolution as allocate
from quant.refinement.adaround import Inputs
from quant.refinement.evolution import Objective
from quant.refinement.group_sizes import bit_ops, bit_ops_at_most, group_choices, mean_at_least
from quant.weights.low_rank import LowRankWeight, lowrank_quantize
from quant.weights.rounding import gptq_quantizer, nearest_quantizer


class Evidence:
    """What the calibration trajectory tells, and the layers that follow from it.

    Attributes:
        absmax: per layer (steps, I).
        smooth: per layer, factors (I,), where the recipe balances it.
        alphas, losses: as in ``Result``.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, weight_bits: int, act_bits: int, linears: dict[str, nn.Module], svd: str):
        self.model, self.recipe, self.weight_bits, self.act_bits, self.linears, self.svd = model, recipe, weight_bits, act_bits, linears, svd
        self.trajectory: Trajectory | None = None
        self.absmax: dict[str, Tensor] = {}
        self.smooth: dict[str, Tensor] = {}
        self.alphas: dict[str, float] = {}
        self.losses: dict[str, Tensor] = {}
        self._moments: dict[str, SecondMoment] = {}
        self._samples: dict[str, Samples] = {}
        self._outputs: dict[str, Samples] = {}
        self._step_ranges: dict[str, StepRange] = {}
        self._reparameterized: dict[str, Reparameterized] = {}

    @property
    def static(self) -> bool:
        return self.recipe.act_range == "static" and self.act_bits != OFF_BITS

    @property
    def needs_trajectory(self) -> bool:
        recipe = self.recipe
        return recipe.balance != "none" or self.static or recipe.weight != "nearest" or recipe.metric == "output"

    def observe(self, bases: dict[str, LowRankWeight]) -> None:
        """Replay the trajectory, if anything of the recipe has to see inputs after their maxima are known, and settle the factors."""
        recipe, linears, steps = self.recipe, self.linears, len(self.trajectory.latents)
        balanced = {name: linear for name, linear in block_linears(self.model).items() if self._balances(name)}
        observers: dict[str, list] = {name: [] for name in linears}

        def attach(kind, names):
            made = {name: kind(name) for name in names}
            for name, observer in made.items():
                observers[name].append(observer)
            return made

        candidates, searches = {}, {}
        if recipe.balance in ("smoothquant", "tas"):
            for name, linear in balanced.items():
                against = bases[name].base.dequantize() if bases else linear.weight
                act_max = aggregate(self.absmax[name], recipe.balance, recipe.timestep)
                candidates[name] = torch.stack([smoothing_factors(act_max, against, a, config.factor_floor) for a in recipe.alphas])
            if len(recipe.alphas) > 1:
                specs = weight_spec(recipe, self.weight_bits), act_spec(recipe, self.act_bits)
                arithmetic = fastest(self.trajectory.latents.device, specs[1])
                searches = attach(lambda name: AlphaSearch(linears[name].weight, linears[name].bias, candidates[name], *specs,
                                                           bases[name].dense() if bases else None, arithmetic), balanced)
        maxima = attach(lambda name: ImageMaxima(), balanced if recipe.balance == "salience" else ())
        if recipe.weight == "gptq" or recipe.metric == "output":
            self._moments = attach(lambda name: SecondMoment(linears[name], steps), linears)
        if self.static:
            if recipe.act_steps == "each":
                self._step_ranges = attach(lambda name: StepRange(), filter(timed, linears))
            tokens = config.sample_tokens // config.sample_images
            picks = self._pick(config.sample_images)
            self._samples = attach(lambda name: Samples(picks, tokens), [name for name in linears if name not in self._step_ranges])
            if recipe.attention != "none":  # whole images, because tokens attend to each other
                whole = self._pick(max(8, config.sample_tokens // self._tokens()))
                self._outputs = attach(lambda name: Samples(whole, of_output=True), [name for name in linears if name.endswith("attn.qkv")])
        if any(observers.values()):
            replay(self.model, linears, self.trajectory, observers, config.replay_tokens, "search" if searches else "replay")

        for name, factors in candidates.items():
            index = searches[name].best() if searches else 0
            self.smooth[name], self.alphas[name] = factors[index], recipe.alphas[index]
        self.losses = {name: search.loss for name, search in searches.items()}
        for name, each in maxima.items():
            self.smooth[name] = salience_factors(each.value, linears[name].weight, config.factor_floor)
        if recipe.balance == "reparameterise":
            spec = act_spec(recipe, self.act_bits)
            for name in balanced:
                self._reparameterized[name] = reparameterize(*channel_ranges(self._samples[name].value, spec, recipe.act_clip), spec)
                self.smooth[name] = self._reparameterized[name].smooth

    def _balances(self, name: str) -> bool:
        kinds = {"none": (), "salience": ("qkv", "proj", "fc1"), "reparameterise": ("qkv", "fc1")}
        return name.endswith(kinds.get(self.recipe.balance, ("qkv", "proj", "fc1", "fc2")))

    def _tokens(self) -> int:
        return (self.model.input_size // self.model.patch_size) ** 2

    def _pick(self, count: int) -> Tensor:
        """Images and steps of the trajectory, as the recipe spreads them."""
        return pick(len(self.trajectory.latents), 2 * len(self.trajectory.labels), count, "normal" if self.recipe.act_steps == "normal" else "uniform")

    def weights(self, factors: dict[str, Tensor], groups: dict[str, int], draft: bool = False, desc: str | None = "weights") -> dict[str, LowRankWeight]:
        """Of the weights scaled by the factors that are given.

        Two-level scales are chosen by how large inputs get: of GPTQ their second moment, else, where they are balanced, maxima squared over the steps.

        Args:
            draft: plainly round to the nearest instead.
            desc: names the progress bar; None is none.
        """
        recipe, found = self.recipe, {}
        for name, linear in tqdm(self.linears.items(), desc=desc, unit="layer", disable=desc is None):
            spec, s = weight_spec(recipe, self.weight_bits, groups.get(name)), factors.get(name)
            weight = matrix(linear) if s is None else matrix(linear) * s
            moment = None
            if name in self._moments:
                moment = self._moments[name].value if s is None else self._moments[name].value / s / s[:, None]
            if recipe.weight == "gptq" and not draft:
                quantizer = gptq_quantizer(spec, moment, recipe.weight_range)
            else:
                importance = (self.absmax[name] / s).square().mean(0) if s is not None and name in self.absmax else None
                quantizer = nearest_quantizer(spec, importance, recipe.weight_range)
            rank = 0 if draft else config.lowrank_rank(recipe, min(weight.shape))
            metric = moment if recipe.metric == "output" else None
            each = lowrank_quantize(weight, quantizer, rank, recipe.rounds, recipe.keep, self.svd, metric)
            found[name] = each if recipe.order == "lowrank-first" else each.integer_branch(weight, metric)
        return found

    def layers(self, weights: dict[str, LowRankWeight], groups: dict[str, int]) -> dict[str, QuantizedLayer]:
        """With activation quantisers and factors."""
        made = {}
        for name, weight in weights.items():
            spec = act_spec(self.recipe, self.act_bits, name, groups.get(name))
            smooth, each = self.smooth.get(name), self._reparameterized.get(name)
            act = Activation(spec)
            if each is not None:
                act = Activation(spec, each.scale, each.zero)
            elif name in self._step_ranges:
                low, high = self._step_ranges[name].low, self._step_ranges[name].high
                act = Activation(spec, *scale_and_zero(low, high, spec), self.trajectory.timesteps)
            elif self.static:
                inputs = self._samples[name].value
                act = Activation(spec, *tensor_range(inputs if smooth is None else inputs / smooth, spec, self.recipe.act_clip))
            made[name] = QuantizedLayer(weight, act, smooth, shift=None if each is None else each.shift)
        return made

    def operands(self) -> dict[str, Operands]:
        """Of every attention, if the recipe quantises them."""
        made, spec, clip = {}, act_spec(self.recipe, self.act_bits), self.recipe.act_clip
        for i, block in enumerate(self.model.blocks if self.recipe.attention != "none" and self.static else ()):
            outputs = self._outputs[f"blocks.{i}.attn.qkv"].value
            q, k, v = outputs.chunk(3, -1)
            smooth = self.smooth.get(f"blocks.{i}.attn.proj")
            query, key, value = (Activation(spec, *tensor_range(each, spec, clip)) for each in (q, k, v if smooth is None else v / smooth))
            sample = softmax_of(block.attn, outputs)
            uniform = self.recipe.attention == "uniform"
            probabilities = Activation(spec, *tensor_range(sample, spec, clip)) if uniform else fit_powers(sample, spec.bits, clip)
            made[f"blocks.{i}.attn"] = Operands(query, key, value, probabilities, smooth)
        return made

    def inputs(self) -> Inputs:
        """Of the model, to reconstruct its blocks with."""
        step, image = self._pick(config.reconstruction_samples).to(self.trajectory.latents.device).T
        labels = torch.cat([self.trajectory.labels, torch.full_like(self.trajectory.labels, self.model.num_classes)])
        return Inputs(self.trajectory.latents[step, image % len(self.trajectory.labels)], self.trajectory.timesteps[step], labels[image])

    def allocate(self, judge: Objective, history: Path | None) -> tuple[dict[str, int], tuple[allocate.Round, ...]]:
        """Group sizes by evolution (Q-DiT): each candidate is rounded to the nearest, installed and judged."""
        recipe = self.recipe
        shapes = {name: tuple(matrix(linear).shape) for name, linear in self.linears.items()}
        widths = {columns for _, columns in shapes.values()}
        if not any(width % size == 0 for width in widths for size in recipe.group_sizes):
            raise ValueError(f"none of the group sizes {recipe.group_sizes} divides a layer's width: expected divisors of {sorted(widths)}")
        choices = group_choices({name: columns for name, (_, columns) in shapes.items()}, recipe.group_sizes)

        def loss(groups: dict[str, int]) -> float:
            made = self.layers(self.weights(self.smooth, groups, draft=True, desc=None), groups)
            return judge.loss(install(deepcopy(self.model), made))

        share = recipe.population
        budget = allocate.Budget(share, max(1, round(config.evolution_parents * share)), int(config.evolution_crossovers * share),
                                 int(config.evolution_mutations * share), config.evolution_probability, recipe.generations, 0)
        mean = config.mean_group_share * sum(sum(sizes) / len(sizes) for sizes in choices.values()) / len(choices)
        allowed = mean_at_least(mean)
        if recipe.constraint == "bitops":
            uniform = {name: max([size for size in sizes if size <= mean] or [min(sizes)]) for name, sizes in choices.items()}
            bits = (shapes, self.weight_bits, self.act_bits)
            allowed = bit_ops_at_most(bit_ops(uniform, *bits), *bits)
        about = f"{asdict(recipe)} W{self.weight_bits}A{self.act_bits}, {judge.description}, {self._digest()}"
        if history is not None:  # a file for each set of settings
            history = history.with_name(f"{history.stem}-{hashlib.sha256(about.encode()).hexdigest()[:8]}{history.suffix}")
        result = allocate.evolve(choices, loss, allowed, budget, history, about)
        return result.groups, result.history

    def _digest(self) -> str:
        """Tells models and calibration data apart."""
        seen = [matrix(linear) for linear in self.linears.values()] + ([] if self.trajectory is None else [self.trajectory.latents])
        sums = torch.stack([torch.stack([each.sum(), each.square().sum()]) for each in (values.double() for values in seen)])
        return f"weights and trajectory {hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()[:16]}"
