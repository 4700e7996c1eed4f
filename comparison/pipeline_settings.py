"""The checked command line of compare.py, for a pipeline."""
import argparse
from dataclasses import dataclass
from pathlib import Path

from cli.call_arguments import call_arguments, number_of_steps
from cli.parser import refuse_flags
from cli.pipelines import (
    COMPONENT,
    component_of,
    folder_of,
    prompts_file,
    read_prompts,
    whole_folder,
)
from comparison.flags import PIPELINE_RECIPES, make_parser
from comparison.settings import TableSettings, table_settings
from errors import UserError
from files.atomic import writable_folder

# What only models of this repository have.
OTHERS_FLAGS = (
    "image_size", "decode_batch_size", "sampler", "eta", "ckpt", "vae", "inception",
    "report_layers")


@dataclass(frozen=True)
class PipelineTableSettings(TableSettings):
    """The checked command line of compare.py, for a pipeline.

    Attributes:
        folder: of the pipeline, whole; ``model`` may be its id on the hub.
        prompts, calibration_prompts: files of what is drawn and of what recipes calibrate on.
        steps: of calibration and sampling, None for the folder's or the pipeline's own; several
            give a table each.
        guidance: of the samples, None for the folder's or the pipeline's own; several give a table
            each.
        pipeline_args: JSON of more arguments of the pipeline's call.
        reference: ``.npz`` of real images; None: there are none.
        clip: folder of a CLIP model; None for no CLIP score.
    """

    folder: Path
    prompts: Path
    calibration_prompts: Path
    steps: tuple[str | None, ...]
    guidance: tuple[float | None, ...]
    pipeline_args: str | None
    reference: Path | None
    clip: Path | None


def pipeline_settings(args: argparse.Namespace) -> PipelineTableSettings:
    """Check the command line.

    Raises:
        UserError: a flag is wrong or is for other models, or the folder holds no pipeline.
    """
    others = f"the models of this repository, and '{args.model}' is none of them"
    refuse_flags(args, make_parser(""), OTHERS_FLAGS, others)
    folder = folder_of(args.model)
    check_call(args, folder)
    prompts = prompts_file(args.prompts, folder)
    calibration = Path(args.calibration_prompts or prompts)
    check_prompts(prompts)
    check_prompts(calibration)
    common = table_settings(args)
    writable_folder(Path(args.output))
    return PipelineTableSettings(
        **{**common, "recipes": common["recipes"] or PIPELINE_RECIPES},
        prompts=prompts,
        calibration_prompts=calibration,
        steps=tuple(args.num_sampling_steps or [None]),
        guidance=tuple(args.cfg_scale or [None]),
        pipeline_args=args.pipeline_args,
        reference=_only_reference(args.reference),
        clip=None if args.clip is None else Path(args.clip),
        # A download is the last: all else was checked.
        folder=whole_folder(args.model, folder))


def check_call(args: argparse.Namespace, folder: Path) -> None:
    """Check that a pipeline has a transformer, and can be called as asked.

    Raises:
        UserError: it has none, or cannot.
    """
    component_of(folder, COMPONENT)
    for steps in args.num_sampling_steps or []:
        number_of_steps(steps)
    call_arguments(folder, args.pipeline_args)


def check_prompts(path: Path) -> None:
    """Check that prompts can be read, before any work is done.

    Raises:
        UserError: they cannot, or there are none.
    """
    read_prompts(path)


def _only_reference(given: list[str] | None) -> Path | None:
    if given is not None and len(given) != 1:
        raise UserError(f"--reference has {len(given)} files: expected one for a pipeline")
    return None if given is None else Path(given[0])
