"""The story of quantising a pipeline of diffusers: load, sample, quantise, save the folder."""
import argparse
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cards import DiT_models
from cli.call_arguments import NAME as CALL
from cli.call_arguments import Arguments, call_arguments, number_of_steps
from cli.call_arguments import write as write_call
from cli.hub import fetch_file, fetch_parts, is_hub_id, not_given
from cli.next_command import sampling_command
from cli.parser import refuse_flags
from cli.quantize import QuantizedFile
from cli.quantize_flags import make_parser
from cli.recipe_flags import bit_widths, build_recipe, given_flags, recipe_label
from cli.settings import cpu_threads
from cli.stages import stage
from cli.threads import default_threads
from cli.values import at_least, expression, new_folder, user_value
from errors import UserError
from files.atomic import atomic_folder
from quant.checkpoint import default_stem
from quant.recipe import check_recipe

PROMPTS = Path(__file__).with_name("prompts.txt")
PROMPTS_AT_A_TIME = 4
NEXT_IMAGES = 100  # of the command that comes next
INDEX = "model_index.json"  # which a pipeline's folder has
CONFIGURATION = "config.json"  # which a part's folder has
COMPONENT = "transformer"  # what is quantised, if the command line does not say
# What only models of this repository have.
OTHERS_FLAGS = (
    "image_size", "num_classes", "ckpt", "vae", "class_labels", "cfg_scale", "report",
    "report_layers", "reference", "inception", "i3d", "export")


@dataclass(frozen=True)
class PipelineSettings:
    """The checked command line of QuantDiT.py for a pipeline."""

    model: str  # its folder, or its id on the hub
    folder: Path  # that holds at least what says of which parts it consists
    component: str  # the part that is quantised
    recipe: str  # a key of config.RECIPES
    flags: dict[str, Any]  # of the recipe, as ditas.quantize takes them
    prompts: tuple[str, ...]  # one an image
    kept_prompts: tuple[str, ...]  # they go into the folder; none where they are our own
    arguments: Arguments  # of the pipeline's call
    seed: int  # of the first prompt's noise
    output: Path  # the folder that is written
    threads: int  # CPU threads
    offload: bool  # whatever runs is on the GPU only while it does


def is_pipeline(args: argparse.Namespace) -> bool:
    """Tell whether ``--model`` names a folder or an id of the hub, no model of this repository."""
    if args.model is None or args.model in DiT_models:
        return False
    return Path(args.model).is_dir() or is_hub_id(args.model)


def pipeline_settings(args: argparse.Namespace) -> PipelineSettings:
    """Check the command line.

    Raises:
        UserError: a flag is wrong or is for other models, or the folder holds no pipeline.
    """
    others = f"the models of this repository, and '{args.model}' is none of them"
    refuse_flags(args, make_parser(), OTHERS_FLAGS, others)
    folder = folder_of(args.model)
    bits = bit_widths(args)
    recipe = build_recipe(args)
    user_value(check_recipe, recipe, bits.activations)
    given = {flag.name.replace("-", "_"): text for flag, text in given_flags(args).items()
             # The prompts take it.
             if flag.field != "images"}
    chosen = {name: expression(getattr(args, name), f"--{name}")
              for name in ("include", "exclude") if getattr(args, name) is not None}
    steps = args.num_sampling_steps
    prompts = prompts_file(args.prompts, folder)
    texts = read_prompts(prompts)
    # Of an id on the hub, its last part.
    name = default_stem(
        Path(args.model).resolve().name, bits.weights, bits.activations, recipe_label(args))
    return PipelineSettings(
        model=args.model,
        folder=folder,
        component=component_of(folder, args.component or COMPONENT),
        recipe=args.recipe,
        flags={
            "weight_bit": bits.weights, "act_bit": bits.activations, "svd": args.svd,
            **chosen, **given},
        prompts=repeated(texts, recipe.images),
        kept_prompts=() if prompts == PROMPTS else texts,
        arguments=call_arguments(
            folder, args.pipeline_args,
            num_inference_steps=None if steps is None else number_of_steps(steps)),
        seed=at_least(args.seed, 0, "--seed"),
        output=new_folder(Path(args.output or Path("results") / name)),
        threads=cpu_threads(args.threads, default_threads()),
        offload=_offload(args),
    )


def folder_of(model: str) -> Path:
    """Return the folder of a pipeline; of one on the hub, what of it can be had at once.

    Raises:
        UserError: the hub does not give it.
    """
    if not is_hub_id(model):
        return Path(model)
    index = fetch_file(model, INDEX)
    if index is None:
        raise not_given(model, f"it has no {INDEX}, or is not in the cache")
    for name in (CALL, PROMPTS.name):
        fetch_file(model, name)
    return index.parent


def whole_folder(model: str, folder: Path) -> Path:
    """Return the folder of a pipeline with all that it takes to sample, downloaded if it must be.

    Args:
        folder: as of ``folder_of``.

    Raises:
        UserError: the hub does not give it.
    """
    return fetch_parts(model, parts_of(read_index(folder))) if is_hub_id(model) else folder


def _offload(args: argparse.Namespace) -> bool:
    if args.offload and not torch.cuda.is_available():
        raise UserError("--offload keeps what does not run off the GPU, and there is none: drop it")
    return args.offload


def component_of(folder: Path, name: str) -> str:
    """Return the name of a pipeline's part, which is there.

    Raises:
        UserError: it is not, or the folder holds no pipeline.
    """
    return named_component(read_index(folder), str(folder), name)


def named_component(index: dict[str, Any], place: str, name: str) -> str:
    """Return the name of a pipeline's part, which its index has.

    Raises:
        UserError: it has not.
    """
    known = parts_of(index)
    if name not in known:
        kind = index.get("_class_name", "pipeline")
        raise UserError(f"'{place}' is a {kind} without a {name}: "
                        f"expected --component to be one of {', '.join(known)}")
    return name


def parts_of(index: dict[str, Any]) -> list[str]:
    """Name the parts that a pipeline has."""
    # One that may be missing is [null, null] where it is.
    return [key for key, value in index.items() if isinstance(value, list) and any(value)]


def read_index(folder: Path) -> dict[str, Any]:
    """Read what a pipeline's folder says of its class and its parts.

    Raises:
        UserError: it says nothing.
    """
    index = read_object(folder / INDEX)
    if index is None:
        raise UserError(f"'{folder}' holds no {INDEX} that can be read: expected the "
                        "folder of a diffusers pipeline")
    return index


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a file that holds a JSON object; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_float(folder: Path, component: str) -> None:
    """Make sure that a part of a pipeline is not quantised.

    Raises:
        UserError: it is, by us or by others.
    """
    # One that cannot be read is left to whoever loads the part.
    configuration = read_object(folder / component / CONFIGURATION) or {}
    if "quantization_config" in configuration:
        raise UserError(f"the {component} of '{folder}' is quantised already: expected the float "
                        "pipeline, or --component to name another part")


def prompts_file(given: str | None, folder: Path) -> Path:
    """Choose the file of prompts: the given one, the folder's ``prompts.txt``, or our own."""
    own = folder / PROMPTS.name
    return Path(given) if given else own if own.is_file() else PROMPTS


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts, one a line; empty lines do not count.

    Raises:
        UserError: there are none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts '{path}': {error}") from None
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise UserError(f"--prompts '{path}' is empty: expected a prompt a line")
    return prompts


def write_prompts(folder: Path, prompts: tuple[str, ...]) -> None:
    """Write a folder's ``prompts.txt``, if there are any: what a pipeline is made to draw."""
    if prompts:
        (folder / PROMPTS.name).write_text("\n".join(prompts) + "\n", encoding="utf-8")


def repeated(prompts: tuple[str, ...], images: int | None) -> tuple[str, ...]:
    """Give every image of calibration a prompt, in turn; None: one image a prompt."""
    count = len(prompts) if images is None else images
    return tuple(prompts[image % len(prompts)] for image in range(count))


def quantize_pipeline(settings: PipelineSettings) -> QuantizedFile:
    """Write the folder of a pipeline whose transformer is quantised; print what was done.

    Raises:
        UserError: the folder is damaged, takes no prompts, or does not allow the recipe.
    """
    # They load diffusers.
    import ditas
    torch.set_num_threads(settings.threads)
    with stage("load"):
        folder = whole_folder(settings.model, settings.folder)
        check_float(folder, settings.component)
        pipeline = load_pipeline(folder)
    if settings.offload:
        run_from_the_cpu(pipeline, settings.component, torch.device("cuda"))
    elif torch.cuda.is_available():
        pipeline.to("cuda")
    with stage("quantise") as quantising:
        done = ditas.quantize(
            getattr(pipeline, settings.component), partial(sample, pipeline, settings),
            settings.recipe, **settings.flags)
    print(done)
    with stage("save"), atomic_folder(settings.output) as temporary:
        pipeline.save_pretrained(temporary)
        write_call(temporary, settings.arguments)
        write_prompts(temporary, settings.kept_prompts)
    print(f"wrote {settings.output}")
    print(f"next: {sampling_command(settings.output, NEXT_IMAGES)}")
    print("next, in Python: import ditas; from diffusers import DiffusionPipeline; "
          f"DiffusionPipeline.from_pretrained({str(settings.output)!r})")
    return QuantizedFile(settings.output, quantising.seconds, None)


def run_from_the_cpu(pipeline, component: str, device: torch.device) -> None:
    """Let a pipeline that lies on the CPU run on a device, with no part there but what runs.

    The component's own blocks follow what they are called with (``ditas.quantize``).
    """
    from diffusers.hooks import apply_group_offloading

    from ditas.switching import is_quantised
    # By leaves: a VAE is entered by other doors than its call.
    leaves = {"offload_type": "leaf_level"}
    # What expands a quantised linear is no leaf that diffusers knows.
    blocks = {"offload_type": "block_level", "num_blocks_per_group": 1}
    for name, part in pipeline.components.items():
        if name != component and isinstance(part, nn.Module):
            how = blocks if is_quantised(part) else leaves
            apply_group_offloading(part, onload_device=device, **how)


def load_pipeline(folder: Path):
    """Load a float pipeline on the CPU: in float32, or in bfloat16 where there is a GPU.

    Raises:
        UserError: it cannot be loaded, or it takes no prompts.
    """
    kind = {"torch_dtype": torch.bfloat16} if torch.cuda.is_available() else {}
    return read_pipeline(folder, **kind)


def read_pipeline(folder: Path, **how):
    """Load a pipeline that takes prompts; ``how`` are arguments of ``from_pretrained``.

    Raises:
        UserError: it cannot be loaded, or it takes no prompts.
    """
    from diffusers import DiffusionPipeline
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **how)
    except UserError:
        raise
    # The loaders raise types of several libraries.
    except Exception as error:
        raise UserError(f"cannot load the pipeline in '{folder}' ({type(error).__name__}: "
                        f"{error}): expected a folder that save_pretrained wrote") from None
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(f"a {type(pipeline).__name__} takes no prompts: quantise its transformer "
                        "from Python with ditas.quantize")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, settings: PipelineSettings) -> None:
    """Sample latents for all prompts, some at a time.

    Raises:
        UserError: the pipeline does not take its arguments.
    """
    for start, prompts in _in_batches(settings.prompts):
        seeds = range(settings.seed + start, settings.seed + start + len(prompts))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call_pipeline(pipeline, prompts, generators, "latent", settings.arguments)


def call_pipeline(
    pipeline,
    prompts: Sequence[str],
    generators: list[torch.Generator],  # one a prompt
    output_type: str,
    arguments: Arguments,
):
    """Call a pipeline; returns its output.

    Raises:
        UserError: it does not take its arguments.
    """
    try:
        return pipeline(
            list(prompts), generator=generators, output_type=output_type, **arguments)
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(f"the {type(pipeline).__name__} cannot sample ({error}): "
                        "--pipeline-args gives it other arguments") from None


def _in_batches(prompts: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for start in range(0, len(prompts), PROMPTS_AT_A_TIME):
        yield start, prompts[start:start + PROMPTS_AT_A_TIME]
