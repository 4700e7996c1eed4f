"""From ``recipe:flag=value`` and ``W4A8`` to a job: a row of the table that is to be filled."""
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cli.recipe_flags import FLAGS, build_recipe
from cli.values import class_labels, one_of, user_value
from comparison.quantdit import parse_arguments
from config import RECIPES, Recipe
from errors import UserError
from files.atomic import file_stem
from quant.balancing.maxima import check_step
from quant.numerics.spec import ACT_BITS, WEIGHT_BITS
from quant.recipe import check_recipe

OVERRIDES = (*(flag.name for flag in FLAGS), "svd", "class-labels")


@dataclass(frozen=True)
class Job:
    """A row to fill: a recipe with overrides at one bit width, or the float model.

    Attributes:
        label: the recipe as it was given.
        bits: weight and activation bits, such as ``4/8``.
        arguments: what QuantDiT.py gets for it; None for the float model.
        recipe: what these mean; None for the float model.
    """

    label: str
    bits: str
    arguments: tuple[str, ...] | None
    recipe: Recipe | None

    @property
    def name(self) -> str:
        """The name of the job's folder."""
        return file_stem(f"{self.label}-W{self.bits.replace('/', 'A')}")


FLOAT = Job("float", "32/32", None, None)


def default_recipes(steps: int, budgets: dict[str, str]) -> list[str]:
    """List every recipe; SmoothQuant at the first, middle and last step.

    Figures 10 to 12 of the DiTAS paper's appendix show it at these three.

    Args:
        budgets: flags of recipes whose published effort is meant for larger models.
    """
    recipes = []
    for recipe in RECIPES:
        if recipe == "smoothquant":
            timesteps = sorted({0, steps // 2, steps - 1})
            recipes += [f"smoothquant:smooth-timestep={timestep}" for timestep in timesteps]
        elif recipe in budgets:
            recipes.append(f"{recipe}:{budgets[recipe]}")
        else:
            recipes.append(recipe)
    return recipes


def parse_job(recipe: str, bits: str, overrides: Sequence[str] = OVERRIDES) -> Job:
    """Parse ``recipe[:flag=value,…]`` and ``W4A8``.

    Args:
        overrides: flags of QuantDiT.py that are allowed: they say how to quantise.

    Raises:
        UserError: unknown recipe, flag or bit width, or parts that do not go together.
    """
    name, _, given = recipe.partition(":")
    one_of(name, RECIPES, "--recipes")
    weight_bits, act_bits = parse_bits(bits)
    arguments = ["--recipe", name, "--weight-bit", str(weight_bits), "--act-bit", str(act_bits)]
    for override in filter(None, given.split(",")):
        flag, equals, value = override.partition("=")
        if flag not in overrides or not equals:
            raise UserError(
                f"bad override '{override}' of recipe '{recipe}': "
                f"expected {', '.join(overrides)}, as in ditas:lowrank=0")
        arguments += [f"--{flag}", value]
    built = build_recipe(parse_arguments(arguments))
    user_value(check_recipe, built, act_bits)
    return Job(recipe, f"{weight_bits}/{act_bits}", tuple(arguments), built)


def parse_bits(bits: str) -> tuple[int, int]:
    """Parse ``W4A8`` to the bits of weights and activations.

    Raises:
        UserError: it is not that, or a width is not available.
    """
    match = re.fullmatch(r"W(\d+)A(\d+)", bits)
    if match is None:
        raise UserError(
            f"bad bit width '{bits}': "
            "expected W<weight bits>A<activation bits>, such as W4A8")
    weight_bits = one_of(int(match[1]), WEIGHT_BITS, "--bits: weight width")
    act_bits = one_of(int(match[2]), ACT_BITS, "--bits: activation width")
    return weight_bits, act_bits


def check_job(job: Job, steps: int, num_classes: int) -> None:
    """Check what QuantDiT.py would refuse of a model and its trajectory, before any work is done.

    Args:
        steps: of the calibration trajectory.
        num_classes: of the model.

    Raises:
        UserError: they do not go together with the recipe.
    """
    if job.arguments is None:
        return
    user_value(check_step, job.recipe.timestep, steps)
    labels = parse_arguments(list(job.arguments)).class_labels
    if labels is not None:
        class_labels(labels, num_classes)
