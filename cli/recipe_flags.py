"""The parts of a recipe as flags of the command line."""
import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import config
from cli.parser import Parser
from cli.values import at_least, one_of
from config import RECIPES, SCOPES, UNITS, Recipe, alpha_grid
from errors import Part, Setting, UserError
from quant.numerics.spec import ACT_BITS, WEIGHT_BITS
from quant.recipe import ADALN_BITS, BitWidths, needs_trajectory, uses_moments

# Turns a flag's text into a value, given what messages call the flag.
Reader = Callable[[str, Part], object]

# How ranges are chosen (``quant.numerics.ranges``, which loads PyTorch).
RANGES = ("minmax", "shrink", "shrink-far", "percentile")

# What the command line calls a recipe's convention.
ZERO_POINTS = {"free": "free", "clamped": "clamped", "widened": "affine"}


@dataclass(frozen=True)
class Needs:
    """What a recipe must be for a flag to have an effect.

    Attributes:
        applies: whether the flag has an effect on a recipe.
        requires: what makes it so, for the message.
    """

    applies: Callable[[Recipe], bool]
    requires: tuple[Part, ...]


ALWAYS = Needs(lambda recipe: True, ())


@dataclass(frozen=True)
class Values:
    """What a flag takes.

    Attributes:
        read: turns a text into a value, or raises a ``UserError``.
        metavar: what help calls it; of a choice all that can be chosen.
    """

    read: Reader
    metavar: str


@dataclass(frozen=True)
class Flag:
    """A flag ``--name`` for a field of ``Recipe``.

    Attributes:
        values: that it takes.
        needs: where it has an effect.
    """

    field: str
    name: str
    values: Values
    help: str
    needs: Needs = ALWAYS

    @property
    def setting(self) -> Setting:
        """What messages call it."""
        return Setting(self.name.replace("-", "_"))


def _choice(*allowed: str) -> Values:
    return _named({name: name for name in allowed})


def _named(values: Mapping[str, object]) -> Values:
    """Choose among values by their names."""
    return Values(lambda text, flag: values[one_of(text, values, flag)], f"{{{','.join(values)}}}")


def _number(minimum: int | None) -> Values:
    return Values(partial(_whole, minimum), "N")


def _whole(minimum: int | None, text: str, flag: Part) -> int:
    try:
        value = int(text)
    except ValueError:
        raise UserError(flag, f" '{text}' is not a whole number") from None
    return value if minimum is None else at_least(value, minimum, flag)


def _alphas(text: str, flag: Part) -> tuple[float, ...]:
    if text == "grid":
        return alpha_grid
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(flag, f" '{text}' is no migration strength: "
                        "expected 'grid' or a number from 0 to 1")
    return (value,)


def _sizes(text: str, flag: Part) -> tuple[int, ...]:
    if text == "none":
        return ()
    parts = text.replace("/", ",").split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(flag, f" '{text}' is no list of group sizes: "
                        "expected 'none' or numbers such as 32,64,128")
    return tuple(map(int, parts))


def _positive(text: str, flag: Part) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(flag, f" '{text}' is not a positive number")
    return value


def _guidance(text: str, flag: Part) -> float:
    return at_least(_positive(text, flag), 1.0, flag)


def _rank(text: str, flag: Part) -> int | None:
    return None if text == "paper" else _whole(0, text, flag)


def _has_one_group_size(recipe: Recipe) -> bool:
    granularities = {recipe.weight_granularity, recipe.act_granularity}
    return not recipe.group_sizes and not granularities.isdisjoint({"group", "strided"})


def _evolves(recipe: Recipe) -> bool:
    return bool(recipe.group_sizes) and recipe.allocate == "evolution"


BEYOND_BLOCKS = [scope for scope in SCOPES if scope != "blocks"]
SIZES = ("a list of ", Setting("group_sizes"))
GROUPED = Needs(
    _has_one_group_size,
    (Setting("weight_granularity", "group", "strided"), ", and ", Setting("group_sizes", "none")))
STATIC = Needs(lambda recipe: recipe.act_range == "static", (Setting("act_range", "static"),))
LEARNED = Needs(lambda recipe: recipe.weight == "adaround", (Setting("weight", "adaround"),))
ALLOCATED = Needs(lambda recipe: bool(recipe.group_sizes), SIZES)
EVOLVED = Needs(_evolves, (*SIZES, ", and ", Setting("allocate", "evolution")))
IN_GROUPS = Needs(
    lambda recipe: recipe.weight_granularity == "group", (Setting("weight_granularity", "group"),))
CALIBRATED = Needs(
    lambda recipe: needs_trajectory(recipe, BitWidths(4, 8)), ("recipes that look at data",))
TWO_LEVEL = Needs(
    lambda recipe: recipe.weight_scales == "two-level", (Setting("weight_scales", "two-level"),))
BY_MOMENTS = Needs(
    uses_moments, (Setting("weight", "gptq"), ", or ", Setting("lowrank_metric", "output")))
CONDITIONED = Needs(lambda recipe: recipe.scope != "blocks", (Setting("scope", *BEYOND_BLOCKS),))
SMOOTHQUANT = Needs(
    lambda recipe: recipe.balance == "smoothquant", (Setting("balance", "smoothquant"),))
MIGRATED = Needs(
    lambda recipe: recipe.balance in ("smoothquant", "tas"),
    (Setting("balance", "smoothquant", "tas"),))
SEARCHED = Needs(
    lambda recipe: MIGRATED.applies(recipe) and len(recipe.alphas) > 1,
    (Setting("alpha", "grid"), ", and ", *MIGRATED.requires))
SHIFTED = Needs(
    lambda recipe: recipe.balance == "reparameterise", (Setting("balance", "reparameterise"),))
BRANCHED = Needs(lambda recipe: recipe.rank != 0, (Setting("lowrank"), " above 0"))

FLAGS = (
    Flag("scope", "scope", _choice(*SCOPES),
         "which linears: of the blocks, these and adaLN modulation, "
         "all but the first and the last, or all and the patch embedding"),
    Flag("balance", "balance",
         _choice("none", "smoothquant", "tas", "salience", "salience-equal",
                 "reparameterise"),
         "where smoothing factors come from"),
    Flag("bias_correction", "bias-correction", _choice("quantised", "float"),
         "the weight whose product with balance reparameterise's shifts is taken out of the bias",
         SHIFTED),
    Flag("timestep", "smooth-timestep", _number(None),
         "index in sampling order that balance smoothquant looks at (0 is the noisiest)",
         SMOOTHQUANT),
    Flag("alphas", "alpha", Values(_alphas, "grid|ALPHA"),
         "migration strength: 'grid' searches layer by layer, or one number", MIGRATED),
    Flag("search_steps", "search-steps", _choice("all", "published"),
         "timesteps whose losses that search sums: all, "
         "or at most the 50 noisiest, as the published code does", SEARCHED),
    Flag("weight", "weight", _choice("nearest", "gptq", "adaround"), "how weights are rounded"),
    Flag("weight_range", "weight-range", _choice(*RANGES),
         "of floating weight scales: minmax, or the best of several"),
    Flag("weight_granularity", "weight-granularity", _choice("channel", "group", "strided"),
         "what shares a weight scale"),
    Flag("weight_group", "group-size", _number(1),
         "weights per scale, where granularity is group or strided", GROUPED),
    Flag("weight_scales", "weight-scales", _choice("float", "two-level"),
         "of groups: floating, which can only be simulated, "
         "or integers inside one scale per output channel"),
    Flag("group_tail", "group-tail", _choice("refuse", "allow"),
         "a last group that is shorter, where a size does not divide the width", IN_GROUPS),
    Flag("convention", "zero-point", _named(ZERO_POINTS),
         "of ranges wholly off zero: free (Q-DiT's paper), clamped to the codes (its code), "
         "or of the range widened to include zero (elsewhere)"),
    Flag("hessian", "hessian", _choice("float", "sequential"),
         "inputs that GPTQ looks at: the float model's, or what the quantised blocks before give",
         BY_MOMENTS),
    Flag("act_granularity", "act-granularity", _choice("tensor", "image", "token", "group"),
         "what shares an activation scale"),
    Flag("act_range", "act-range", _choice("dynamic", "static"),
         "of activations: measured in every call, or found once"),
    Flag("act_clip", "act-clip", _choice(*RANGES, "search"),
         "how static ranges are chosen; search is that of PTQ4DM's code", STATIC),
    Flag("act_steps", "act-steps", _choice("uniform", "normal", "embedding", "each"),
         "timesteps that static ranges are found on; each has ranges of its own for every input, "
         "or for what the timestep embedding decides", STATIC),
    Flag("attention", "attention", _choice("none", "uniform", "log-sqrt2"),
         "quantiser of queries, keys, values and the softmax output"),
    Flag("rank", "lowrank", Values(_rank, "N|paper"),
         "rank of the low-rank branch; 0 for none, "
         "'paper' for 32 at width 1152 and the same share elsewhere"),
    Flag("metric", "lowrank-metric", _choice("weight", "output"),
         "errors that the low-rank branch makes small", BRANCHED),
    Flag("adaln_input", "adaln-input", _choice("quantised", "float"),
         "inputs of adaLN and of the timestep embedder", CONDITIONED),
    Flag("adaln_bits", "adaln-weight-bit", _named({str(bits): bits for bits in ADALN_BITS}),
         "of the adaLN modulation, weight-only; 16 is none"),
    Flag("units", "units", _choice(*UNITS),
         "what AdaRound learns at once: blocks; whole, with the linears around them; temporal, all "
         "that the timestep embedding decides and then the rest of the blocks", LEARNED),
    Flag("learned", "learn", _choice("both", "rounding"),
         "what AdaRound learns: rounding and activation steps, or rounding alone", LEARNED),
    Flag("iterations", "iterations", _number(1), "of AdaRound, per unit", LEARNED),
    Flag("rounding_rate", "rounding-rate", Values(_positive, "RATE"),
         "learning rate of AdaRound; fewer iterations need a higher one", LEARNED),
    Flag("tuning", "tune", _number(0),
         "iterations in which codes and branches learn, from end to end, what the float model "
         "gives; 0 for none", TWO_LEVEL),
    Flag("images", "calibration-images", _number(1),
         "images that calibration samples, of classes or prompts in turn "
         "(default: the recipe's, 16, or of a pipeline one a prompt)", CALIBRATED),
    Flag("group_sizes", "group-sizes", Values(_sizes, "SIZES|none"),
         "to choose from for every layer, such as 32,64,128; 'none' for one size"),
    Flag("allocate", "allocate", _choice("evolution", "ilp", "hessian"),
         "how group sizes are chosen: by evolution, or an integer program over the layers' "
         "output errors (ilp) or Hessian traces times weight errors (hessian)", ALLOCATED),
    Flag("population", "population", _number(2), "of evolution", EVOLVED),
    Flag("generations", "generations", _number(1), "of evolution", EVOLVED),
    Flag("constraint", "constraint", _choice("mean", "bitops"), "on the group sizes", ALLOCATED),
    Flag("judge", "judge", _choice("sqnr", "fid", "fvd"),
         "of group sizes: SQNR of latents, FID of 500 images, or FVD of 100 videos", ALLOCATED),
    Flag("judge_sampler", "judge-sampler", _choice("ddim", "ddpm"),
         "how the judge's images are sampled", ALLOCATED),
    Flag("judge_cfg_scale", "judge-cfg-scale", Values(_guidance, "SCALE"),
         "guidance of the judge's images; 1 is none", ALLOCATED),
)


def add_recipe_flags(parser: Parser) -> None:
    """Add the flags of ``FLAGS``."""
    group = parser.add_argument_group(
        "parts of the recipe (default: the recipe's own, see config.py)")
    for flag in FLAGS:
        group.add_argument(
            f"--{flag.name}", dest=f"part_{flag.field}", metavar=flag.values.metavar,
            help=flag.help)


def build_recipe(args: argparse.Namespace) -> Recipe:
    """Put the flags that were given on top of the chosen row of ``config.RECIPES``.

    Raises:
        UserError: an unknown recipe or value, or a flag that has no effect on what the recipe is
            now.
    """
    return recipe_with(args.recipe, given_flags(args))


def recipe_with(recipe_name: str, given: dict[Flag, str]) -> Recipe:
    """Put flags, by their texts, on top of a row of ``config.RECIPES``.

    Raises:
        UserError: as ``build_recipe``.
    """
    recipe = RECIPES[one_of(recipe_name, RECIPES, Setting("recipe"))]
    values = {flag.field: flag.values.read(text, flag.setting) for flag, text in given.items()}
    recipe = replace(recipe, **values)
    for flag in given:
        if not flag.needs.applies(recipe):
            raise UserError(flag.setting, " has no effect on this recipe: it is for ",
                            *flag.needs.requires)
    return recipe


def bit_widths(args: argparse.Namespace) -> BitWidths:
    """Read ``--weight-bit`` and ``--act-bit``, those of ``config`` where they are not given.

    Raises:
        UserError: a width is not available.
    """
    weights = config.weight_bit if args.weight_bit is None else args.weight_bit
    activations = config.act_bit if args.act_bit is None else args.act_bit
    return BitWidths(
        one_of(weights, WEIGHT_BITS, "--weight-bit"), one_of(activations, ACT_BITS, "--act-bit"))


def recipe_label(args: argparse.Namespace) -> str:
    """Name the recipe and the flags that were given: ``ditas:lowrank=0,weight=gptq``.

    compare.py takes recipes in this form.
    """
    return labelled(args.recipe, given_flags(args))


def labelled(recipe_name: str, given: dict[Flag, str]) -> str:
    """Name a recipe with flags, as ``recipe_label`` does."""
    overrides = ",".join(f"{flag.name}={text}" for flag, text in given.items())
    return f"{recipe_name}:{overrides}" if overrides else recipe_name


def given_flags(args: argparse.Namespace) -> dict[Flag, str]:
    """Find the flags of a recipe that were given, with their texts."""
    texts = {flag: getattr(args, f"part_{flag.field}") for flag in FLAGS}
    return {flag: text for flag, text in texts.items() if text is not None}
