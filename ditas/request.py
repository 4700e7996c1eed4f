"""What a caller of ``ditas.quantize`` asks for: the flags of QuantDiT.py as keywords."""
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import config
from cli.recipe_flags import FLAGS, Flag, labelled, recipe_with
from cli.values import expression, one_of, user_value
from config import Recipe
from errors import UserError
from quant.numerics.spec import ACT_BITS, WEIGHT_BITS
from quant.recipe import (
    BitWidths,
    check_recipe,
    is_tuned,
    learns_rounding,
    needs_trajectory,
    runs_quantised_so_far,
)
from quant.weights.low_rank import SOLVERS

# Keywords that are no part of a recipe, with what they are where they are not given.
DEFAULTS = {
    "weight_bit": config.weight_bit,
    "act_bit": config.act_bit,
    "svd": "fast",
    "backend": "auto",
    "include": "",
    "exclude": "",
}
# How many images there are is up to what the caller runs.
RECIPE_FLAGS = {flag.name.replace("-", "_"): flag for flag in FLAGS if flag.field != "images"}


@dataclass(frozen=True)
class Request:
    """A recipe and its surroundings, checked.

    Attributes:
        recipe_name, flags: as they were given.
        label: the recipe's name with the flags that were given.
        svd: the low-rank solver.
        backend: one of ``config.BACKENDS``.
        include, exclude: as of ``architectures.selected``.
    """

    recipe_name: str
    flags: dict[str, Any]
    recipe: Recipe
    label: str
    bits: BitWidths
    svd: str
    backend: str
    include: str
    exclude: str

    @property
    def needs_calls(self) -> bool:
        """Whether the recipe has to see the model sample."""
        return needs_trajectory(self.recipe, self.bits)

    @property
    def runs_copies(self) -> bool:
        """Whether the recipe looks at what a quantised copy of the model computes."""
        return (runs_quantised_so_far(self.recipe, self.bits) or bool(self.recipe.group_sizes)
                or learns_rounding(self.recipe, self.bits) or is_tuned(self.recipe, self.bits))


def read_request(recipe_name: str, flags: dict[str, Any]) -> Request:
    """Check a recipe's name and keywords.

    Raises:
        UserError: one is unknown or out of range, or they do not go together.
    """
    others = dict(DEFAULTS)
    given: dict[Flag, str] = {}
    for name, value in flags.items():
        if name in others:
            others[name] = value
        elif name in RECIPE_FLAGS:
            given[RECIPE_FLAGS[name]] = _as_text(value)
        else:
            raise UserError(f"'{name}' is no flag of a recipe{_advice(name)}")
    recipe = recipe_with(recipe_name, given)
    bits = BitWidths(
        one_of(others["weight_bit"], WEIGHT_BITS, "weight_bit"),
        one_of(others["act_bit"], ACT_BITS, "act_bit"))
    user_value(check_recipe, recipe, bits.activations)
    return Request(
        recipe_name, flags, recipe, labelled(recipe_name, given), bits,
        svd=one_of(others["svd"], SOLVERS, "svd"),
        backend=one_of(others["backend"], config.BACKENDS, "backend"),
        include=expression(others["include"], "include"),
        exclude=expression(others["exclude"], "exclude"))


def request_of_label(label: str, weight_bits: int, act_bits: int) -> Request:
    """Read what ``cli.recipe_flags.labelled`` wrote: ``ditas:lowrank=0,weight=gptq``.

    Raises:
        UserError: as ``read_request``.
    """
    name, _, text = label.partition(":")
    flags: dict[str, Any] = {"weight_bit": weight_bits, "act_bit": act_bits}
    for item in filter(None, text.split(",")):
        flag, equals, value = item.partition("=")
        if equals:
            last = flag.replace("-", "_")
            flags[last] = value
        else:
            # A list of several values.
            flags[last] += f",{item}"
    return read_request(name, flags)


def _as_text(value: Any) -> str:
    """Write a value as the command line would have it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def _advice(name: str) -> str:
    alike = get_close_matches(name, [*DEFAULTS, *RECIPE_FLAGS], n=1)
    return f": did you mean {alike[0]}?" if alike else ": QuantDiT.py --help lists them"
