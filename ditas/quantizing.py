"""Quantise a module in place: record its calls, look into it, run the recipe, put layers in."""
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from architectures.discover import find_blocks
from architectures.explored import explore, unvisited
from architectures.registry import architecture_of, describe, is_known
from architectures.selected import SelectedArchitecture
from architectures.sites import Call
from architectures.tracing import images_of
from cli.values import user_value
from ditas.judging import output_judge
from ditas.outcome import Outcome
from ditas.placing import check_not_quantised, put_in
from ditas.request import Request, read_request
from ditas.undo import unchanged_on_failure
from errors import UserError
from quant.calibration.arguments import batched_arguments, clock_of
from quant.calibration.calls import recorded_calls, stack
from quant.pipeline import Result, quantize_model
from quant.refinement.allocation import GroupSearch
from quant.streaming import accelerator_of, following

# Whatever makes the module run.
Drive = Callable[[], object]


def quantize(
    module: nn.Module, drive: Drive | None = None, recipe: str = "ditas", **flags
) -> Outcome:
    """Quantise a module with repeated blocks, in place; a failure leaves it as it was.

    Args:
        module: in float32 or bfloat16, on any device. If it lies on the CPU and ``drive`` calls it
            with tensors on an accelerator, its blocks go there one at a time, as they run.
        drive: called once; what it calls the module with, in whatever way, is the calibration
            data: a pipeline's sampling, for one. None will do for recipes that look at no data.
        recipe: a key of ``config.RECIPES``.
        flags: those of QuantDiT.py as keywords: ``weight_bit=4``, ``act_bit=8``, ``lowrank=16``, …;
            ``backend``, as of sample_merge_TAS.py; ``include`` and ``exclude``, regular expressions
            of linears that are quantised whatever the scope, and of those that are not.

    Returns:
        What was done, site by site.

    Raises:
        UserError: a flag is wrong, or the module or its calls do not allow the recipe.
    """
    request = read_request(recipe, flags)
    check_type(module, request)
    check_not_quantised(module)
    with unchanged_on_failure(module), torch.no_grad():
        module.eval()
        with following(module, user_value(blocks_of, module)):
            calls = [] if drive is None else record_calls(module, drive)
            user_value(look_into, module, calls, request)
            select(module, request)
            result = user_value(run_recipe, module, request, calls)
        return put_in(module, request, result)


def check_type(module: nn.Module, request: Request) -> None:
    """Make sure that a module holds numbers which the recipe can work with.

    Raises:
        UserError: it has no parameters, or they are of another type.
    """
    kinds = {parameter.dtype for parameter in module.parameters()}
    if not kinds:
        raise UserError(f"a {type(module).__name__} without parameters cannot be quantised")
    if not kinds <= {torch.float32, torch.bfloat16}:
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise UserError(f"the module's parameters are of type {names}: "
                        "expected float32 or bfloat16; convert it with .to(torch.bfloat16)")
    if request.runs_copies and kinds != {torch.float32}:
        raise UserError(f"recipe {request.label} runs copies of the module in float32, and this "
                        f"{type(module).__name__} is of bfloat16: convert it with .float() first")


def blocks_of(module: nn.Module) -> list[str]:
    """Name the blocks of a module.

    Raises:
        ValueError: it has none that are repeated.
    """
    if is_known(module):
        return architecture_of(module).blocks(module)
    return find_blocks(module)


def record_calls(module: nn.Module, drive: Drive) -> list[Call]:
    """Let ``drive`` run, and keep every call of the module.

    Raises:
        UserError: there was none.
    """
    with recorded_calls(module) as calls:
        drive()
    if not calls:
        raise UserError(f"drive() never called the {type(module).__name__}: "
                        "expected it to sample with the pipeline that the module belongs to")
    return calls


def look_into(module: nn.Module, calls: list[Call], request: Request) -> None:
    """Let a module carry what can be found out of its inside, if that is not known.

    Raises:
        ValueError: it has no repeated blocks, or none that reads tokens.
    """
    if is_known(module):
        return
    if not calls:
        describe(module, unvisited(module))
        return
    call = calls[0]
    batched = batched_arguments(module, call)
    if images_of(call) == 1 and batched:
        # A vector per image has to differ from one for all.
        call = stack([call, call], batched)
    found = explore(module, call, batched, clock_of(calls))
    if request.recipe.units == "temporal":
        found = found.with_temporal(module, call)
    describe(module, found)


def select(module: nn.Module, request: Request) -> None:
    """Let a module carry what the user chose of it.

    Raises:
        UserError: nothing is left of the recipe's scope.
    """
    if request.include or request.exclude:
        found = architecture_of(module)
        describe(module, SelectedArchitecture(found, request.include, request.exclude))
    if not architecture_of(module).sites(module, request.recipe.scope):
        raise UserError(f"no linear of this {type(module).__name__} is left to be quantised: "
                        "give another exclude")


def run_recipe(module: nn.Module, request: Request, calls: list[Call]) -> Result:
    """Quantise the module, which is left as it was.

    Raises:
        ValueError: the recipe needs calls and there are none, or as ``quantize_model``.
    """
    has_sizes = bool(request.recipe.group_sizes)
    if not calls and (request.needs_calls or has_sizes):
        raise ValueError(f"recipe {request.label} looks at the calls of the model: "
                         "give drive, a function that samples once")

    def again(model: nn.Module) -> None:
        for call in tqdm(calls, desc="record", unit="step"):
            model(**call)

    search = GroupSearch(output_judge(module, calls)) if has_sizes else None
    return quantize_model(
        module, request.recipe, request.bits, again, request.svd, search, accelerator_of(calls))
