"""What the parts of a recipe mean in numbers, and which of them do not go together."""
from collections.abc import Callable
from dataclasses import dataclass

from config import Recipe
from errors import Part, Setting, SettingError
from quant.numerics.spec import OFF_BITS, QuantSpec

# Widths of the adaLN modulation's weights that a checkpoint can hold.
ADALN_BITS = (4, 8, OFF_BITS)


@dataclass(frozen=True)
class BitWidths:
    """Bits per weight and per activation; 16 leaves them alone."""

    weights: int
    activations: int

    @property
    def leave_weights(self) -> bool:
        return self.weights == OFF_BITS

    @property
    def leave_activations(self) -> bool:
        return self.activations == OFF_BITS


def weight_spec(recipe: Recipe, bits: int, group: int | None = None) -> QuantSpec:
    """Say how weights are quantised; ``group`` is the size of one layer, where sizes differ."""
    convention = "two-level" if recipe.weight_scales == "two-level" else recipe.convention
    size = group or recipe.weight_group
    return QuantSpec(bits, recipe.weight_granularity, size, convention, _has_tail(recipe))


def _has_tail(recipe: Recipe) -> bool:
    return recipe.group_tail == "allow"


def has_weight_only_adaln(recipe: Recipe, weight_bits: int) -> bool:
    """Tell whether the modulation's weights are quantised though no scope holds them."""
    return recipe.adaln_bits != OFF_BITS and weight_bits != OFF_BITS


def adaln_spec(bits: int, columns: int) -> QuantSpec:
    """Say how a weight-only modulation with ``columns`` inputs is quantised.

    One group per output channel, whose weights are integers of at most 127.
    """
    return QuantSpec(bits, "group", columns, "two-level")


def has_static_ranges(recipe: Recipe, bits: BitWidths) -> bool:
    """Tell whether ranges of activations are found before sampling."""
    return recipe.is_static and not bits.leave_activations


def weighs_layers(recipe: Recipe) -> bool:
    """Tell whether group sizes are chosen by what each layer costs on its own."""
    return bool(recipe.group_sizes) and recipe.allocate != "evolution"


def learns_rounding(recipe: Recipe, bits: BitWidths) -> bool:
    """Tell whether units are reconstructed by AdaRound."""
    return recipe.weight == "adaround" and not bits.leave_weights


def is_tuned(recipe: Recipe, bits: BitWidths) -> bool:
    """Tell whether codes and branches are tuned from end to end."""
    return recipe.tuning > 0 and not bits.leave_weights


def runs_quantised_so_far(recipe: Recipe, bits: BitWidths) -> bool:
    """Tell whether weights are quantised by what the layers before, quantised, give."""
    sequential = uses_moments(recipe) and recipe.hessian == "sequential"
    return sequential and not bits.leave_weights


def needs_trajectory(recipe: Recipe, bits: BitWidths) -> bool:
    """Tell whether any part of a recipe has to see the model sample."""
    return (recipe.balance != "none" or has_static_ranges(recipe, bits) or weighs_layers(recipe)
            or recipe.weight != "nearest" or recipe.metric == "output"
            or is_tuned(recipe, bits))


def act_spec(
    recipe: Recipe, bits: int, per_image: bool = False, group: int | None = None
) -> QuantSpec:
    """Say how the input of a layer is quantised.

    Args:
        per_image: the input is a vector per image, which is one token.
        group: the size of this layer, where sizes differ.
    """
    if per_image and recipe.adaln_input == "float":
        bits = OFF_BITS
    granularity = recipe.act_granularity
    if granularity == "image" and per_image:
        granularity = "token"
    size = (group or recipe.weight_group) if granularity == "group" else 0
    return QuantSpec(bits, granularity, size, recipe.convention, _has_tail(recipe))


@dataclass(frozen=True)
class Conflict:
    """Parts of a recipe that do not go together.

    Attributes:
        when: whether a recipe has it, at a bit width of the activations.
        because: the reason, for the person at the terminal.
        instead: what avoids it.
    """

    when: Callable[[Recipe, int], bool]
    because: str
    instead: tuple[Part, ...]


def _has_floating_scales(recipe: Recipe) -> bool:
    return recipe.weight_scales == "float" and recipe.weight_granularity != "strided"


def _uses_maxima(recipe: Recipe) -> bool:
    return recipe.balance in ("smoothquant", "tas")


def _is_repq(recipe: Recipe) -> bool:
    return recipe.balance == "reparameterise" or recipe.attention == "log-sqrt2"


def uses_moments(recipe: Recipe) -> bool:
    """Tell whether weights are quantised by the second moment of their inputs."""
    return recipe.weight == "gptq" or recipe.metric == "output"


def _has_groups(recipe: Recipe) -> bool:
    granularities = {recipe.weight_granularity, recipe.act_granularity}
    return not granularities.isdisjoint({"group", "strided"})


AND, OR = " and ", ", or "
OTHER_KINDS = (Setting("balance"), AND, Setting("attention"), " of another kind")

CONFLICTS = (
    Conflict(
        when=lambda recipe, _: (
            recipe.weight_scales == "two-level" and recipe.weight_granularity != "group"),
        because="two-level weight scales are for groups along the inputs",
        instead=(Setting("weight_granularity", "group"), OR, Setting("weight_scales", "float"))),
    Conflict(
        when=lambda recipe, _: _has_groups(recipe) and recipe.weight_group < 1,
        because="groups need a size",
        instead=(Setting("group_size"),)),
    Conflict(
        when=lambda recipe, _: (
            recipe.act_granularity == "group" and recipe.weight_granularity != "group"),
        because="activations are grouped as weights are",
        instead=(Setting("weight_granularity", "group"), " too")),
    Conflict(
        when=lambda recipe, _: recipe.is_static and recipe.act_granularity != "tensor",
        because="static ranges are one per layer",
        instead=(Setting("act_granularity", "tensor"), OR, Setting("act_range", "dynamic"))),
    Conflict(
        when=lambda recipe, _: recipe.attention != "none" and not recipe.is_static,
        because="quantised attention operands have static ranges",
        instead=(Setting("act_range", "static"), " too", OR, Setting("attention", "none"))),
    Conflict(
        when=lambda recipe, _: recipe.act_steps != "uniform" and not recipe.is_static,
        because="timesteps that are not drawn uniformly are for static ranges",
        instead=(Setting("act_range", "static"),)),
    Conflict(
        when=lambda recipe, _: recipe.act_steps == "each" and _is_repq(recipe),
        because="RepQ-ViT's factors and powers of the square root of 2 are the same at every step",
        instead=(Setting("act_steps", "embedding"), OR, *OTHER_KINDS)),
    Conflict(
        when=lambda recipe, _: recipe.act_clip == "search" and _is_repq(recipe),
        because="a search of scale and zero point is for uniform ranges of whole tensors",
        instead=(Setting("act_clip", "percentile"), OR, *OTHER_KINDS)),
    Conflict(
        when=lambda recipe, _: recipe.balance == "reparameterise" and not recipe.is_static,
        because="balancing by RepQ-ViT's reparameterisation is for static ranges",
        instead=(Setting("act_range", "static"),)),
    Conflict(
        when=lambda recipe, act_bits: (
            recipe.balance == "reparameterise" and act_bits == OFF_BITS),
        because="without quantised activations there are no ranges to reparameterise",
        instead=(Setting("act_bit"), " 4 to 8", OR, Setting("balance"), " of another kind")),
    Conflict(
        when=lambda recipe, _: (
            _uses_maxima(recipe) and len(recipe.alphas) > 1
            and (recipe.is_static or recipe.act_granularity == "group")),
        because="the grid search scores dynamic ranges per token, image or tensor",
        instead=("one ", Setting("alpha"), ", or other activations")),
    Conflict(
        when=lambda recipe, _: _uses_maxima(recipe) and not recipe.alphas,
        because="balancing by activation maxima needs a migration strength",
        instead=(Setting("alpha"),)),
    Conflict(
        when=lambda recipe, _: recipe.weight != "nearest" and recipe.order == "lowrank-first",
        because="GPTQ and AdaRound need the calibration trajectory, which comes after the weights "
                "in the order lowrank-first",
        instead=(Setting("weight", "nearest"),)),
    Conflict(
        when=lambda recipe, _: recipe.weight == "gptq" and recipe.weight_granularity == "strided",
        because="GPTQ works on whole rows or groups of consecutive inputs",
        instead=("another ", Setting("weight_granularity"), OR, Setting("weight", "nearest"))),
    Conflict(
        when=lambda recipe, _: (
            recipe.weight == "adaround"
            and (not _has_floating_scales(recipe) or recipe.rank != 0)),
        because="AdaRound learns the rounding of floating scales without a low-rank branch",
        instead=(Setting("weight_scales", "float"), AND, Setting("lowrank", 0), OR,
                 Setting("weight", "nearest"))),
    Conflict(
        when=lambda recipe, _: (
            recipe.weight_range != "minmax" and not _has_floating_scales(recipe)),
        because="weight ranges other than minmax are for floating scales",
        instead=(Setting("weight_scales", "float"), OR, Setting("weight_range", "minmax"))),
    Conflict(
        when=lambda recipe, _: (
            recipe.tuning > 0 and (recipe.weight_scales != "two-level" or recipe.is_static)),
        because="tuning is for two-level weight scales and dynamic ranges of activations",
        instead=(Setting("weight_scales", "two-level"), AND, Setting("act_range", "dynamic"), OR,
                 Setting("tune", 0))),
    Conflict(
        when=lambda recipe, _: recipe.metric == "output" and recipe.order == "lowrank-first",
        because="the low-rank branch cannot look at outputs in the order lowrank-first",
        instead=(Setting("lowrank_metric", "weight"),)),
    Conflict(
        when=lambda recipe, _: (
            bool(recipe.group_sizes) and recipe.weight_granularity != "group"),
        because="a choice of group sizes is for weights in groups",
        instead=(Setting("weight_granularity", "group"), OR, Setting("group_sizes", "none"))),
    Conflict(
        when=lambda recipe, _: (
            _has_tail(recipe)
            and (not _has_floating_scales(recipe) or recipe.weight_range != "minmax"
                 or recipe.weight == "adaround")),
        because="a short last group is for floating scales from minima and maxima, "
                "rounded to the nearest or by GPTQ",
        instead=(Setting("group_tail", "refuse"), OR, Setting("weight_scales", "float"), AND,
                 Setting("weight_range", "minmax"), AND, Setting("weight", "gptq"))),
    Conflict(
        when=lambda recipe, _: (
            bool(recipe.group_sizes) and recipe.allocate != "evolution" and recipe.is_static),
        because="integer programs weigh layers with dynamic ranges",
        instead=(Setting("allocate", "evolution"), OR, Setting("act_range", "dynamic"))),
    Conflict(
        when=lambda recipe, _: recipe.scope != "blocks" and recipe.adaln_bits != OFF_BITS,
        because="every scope but blocks quantises adaLN modulation already",
        instead=(Setting("adaln_weight_bit", OFF_BITS),)),
    Conflict(
        when=lambda recipe, _: (
            recipe.order == "lowrank-first" and recipe.weight_granularity != "strided"),
        because="the order lowrank-first is for strided groups, whose scales follow the input "
                "channels",
        instead=(Setting("weight_granularity", "strided"),)),
)


def check_recipe(recipe: Recipe, act_bits: int) -> None:
    """Make sure that the parts of a recipe go together.

    Raises:
        SettingError: some do not; the message says why and what to give instead.
    """
    for conflict in CONFLICTS:
        if conflict.when(recipe, act_bits):
            raise SettingError(
                f"these parts do not go together: {conflict.because}: give ", *conflict.instead)
