"""What the parts of a recipe mean for each layer, and which of them go together."""

from architectures.dit import timed
from config import Recipe
from quant.numerics.uniform import OFF_BITS, QuantSpec


def weight_spec(recipe: Recipe, bits: int, group: int | None = None) -> QuantSpec:
    """``group`` is that of one layer, where sizes differ."""
    convention = "two-level" if recipe.weight_scales == "two-level" else recipe.convention
    return QuantSpec(bits, recipe.weight_granularity, group or recipe.weight_group, convention)


def adaln_spec(bits: int, columns: int) -> QuantSpec:
    """Of a weight-only modulation with ``columns`` inputs: one group per output channel, integers of at most 127."""
    return QuantSpec(bits, "group", columns, "two-level")


def act_spec(recipe: Recipe, bits: int, name: str = "", group: int | None = None) -> QuantSpec:
    """Of the layer ``name``; a vector per image is a token."""
    granularity = "token" if recipe.act_granularity == "image" and timed(name) else recipe.act_granularity
    return QuantSpec(bits, granularity, (group or recipe.weight_group) if granularity == "group" else 0, recipe.convention)


def check_recipe(recipe: Recipe, act_bits: int) -> None:
    """Raises:
        ValueError: parts of the recipe do not go together.
    """
    floating = recipe.weight_scales == "float" and recipe.weight_granularity != "strided"
    searched = recipe.balance in ("smoothquant", "tas") and len(recipe.alphas) > 1
    static = recipe.act_range == "static"
    wrong = {
        "two-level weight scales are for groups along the inputs: give --weight-granularity group, or --weight-scales float":
            recipe.weight_scales == "two-level" and recipe.weight_granularity != "group",
        "groups need a size: give --group-size": {"group", "strided"} & {recipe.weight_granularity, recipe.act_granularity} and recipe.weight_group < 1,
        "activations are grouped as weights are: give --weight-granularity group too":
            recipe.act_granularity == "group" and recipe.weight_granularity != "group",
        "static ranges are one per layer: give --act-granularity tensor, or --act-range dynamic": static and recipe.act_granularity != "tensor",
        "quantised attention operands have static ranges: give --act-range static too, or --attention none": recipe.attention != "none" and not static,
        "--act-steps normal and each are for static ranges: give --act-range static": recipe.act_steps != "uniform" and not static,
        "balancing by RepQ-ViT's reparameterisation is for static ranges: give --act-range static": recipe.balance == "reparameterise" and not static,
        "without quantised activations (--act-bit 16) there are no ranges to reparameterise": recipe.balance == "reparameterise" and act_bits == OFF_BITS,
        "the grid search scores dynamic ranges per token, image or tensor: give one --alpha, or other activations":
            searched and (static or recipe.act_granularity == "group"),
        "balancing by activation maxima needs a migration strength: give --alpha": recipe.balance in ("smoothquant", "tas") and not recipe.alphas,
        "GPTQ and AdaRound need the calibration trajectory, which comes after the weights in the order lowrank-first: give --weight nearest":
            recipe.weight != "nearest" and recipe.order == "lowrank-first",
        "GPTQ works on whole rows or groups of consecutive inputs: give another --weight-granularity, or --weight nearest":
            recipe.weight == "gptq" and recipe.weight_granularity == "strided",
        "AdaRound learns the rounding of floating scales without a low-rank branch: give --weight-scales float --lowrank 0, or --weight nearest":
            recipe.weight == "adaround" and (not floating or recipe.rank != 0),
        "weight ranges other than minmax are for floating scales: give --weight-scales float, or --weight-range minmax":
            recipe.weight_range != "minmax" and not floating,
        "the low-rank branch cannot look at outputs in the order lowrank-first: give --lowrank-metric weight":
            recipe.metric == "output" and recipe.order == "lowrank-first",
        "a choice of group sizes is for weights in groups: give --weight-granularity group, or --group-sizes none":
            bool(recipe.group_sizes) and recipe.weight_granularity != "group",
        "scope adaln and all quantise adaLN modulation already: give --adaln-weight-bit 16": recipe.scope != "blocks" and recipe.adaln_bits != OFF_BITS,
        "the order lowrank-first is for strided groups, whose scales follow the input channels: give --weight-granularity strided":
            recipe.order == "lowrank-first" and recipe.weight_granularity != "strided",
    }
    for reason, found in wrong.items():
        if found:
            raise ValueError(f"these parts do not go together: {reason}")


ADALN_BITS = (4, 8, OFF_BITS)
