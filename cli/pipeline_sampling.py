"""The checked command line of sample_merge_TAS.py, for the folder of a pipeline."""
import argparse
from dataclasses import dataclass
from pathlib import Path

from cli.call_arguments import Arguments, call_arguments, number_of_steps
from cli.parser import refuse_flags
from cli.pipelines import COMPONENT, INDEX, prompts_file, read_index, read_prompts
from cli.sample_flags import make_parser
from cli.sample_settings import RunSettings, run_settings
from errors import UserError
from quant.checkpoint import SUFFIX

# What only models of this repository have.
OTHERS_FLAGS = (
    "model", "image_size", "num_classes", "ckpt", "vae", "weight_bit", "act_bit", "sampler", "eta",
    "class_labels", "decode_batch_size", "fold", "cpu_weights")


@dataclass(frozen=True)
class PipelineSampling:
    """The checked command line of sample_merge_TAS.py for a pipeline's folder."""

    path: Path
    kind: str  # the pipeline's class
    prompts: tuple[str, ...]  # image i shows number i modulo their number
    arguments: Arguments  # of the pipeline's call
    dtype: str | None  # of all that is not integer; None: the device decides
    run: RunSettings


def is_pipeline_folder(args: argparse.Namespace) -> bool:
    """Tell whether ``--path`` names a folder, and no checkpoint of ours."""
    if args.path is None or not Path(args.path).is_dir():
        return False
    return (Path(args.path) / INDEX).is_file() or not Path(args.path + SUFFIX).is_file()


def pipeline_sampling(args: argparse.Namespace) -> PipelineSampling:
    """Check the command line.

    Raises:
        UserError: a flag is wrong or is for other models, or the folder holds no pipeline.
    """
    others = f"the models of this repository, and '{args.path}' is a folder"
    refuse_flags(args, make_parser(""), OTHERS_FLAGS, others)
    run = run_settings(args)
    path = Path(args.path)
    kind = _class_of(path)
    steps = args.num_sampling_steps
    return PipelineSampling(
        path=path,
        kind=kind,
        prompts=read_prompts(prompts_file(args.prompts, path)),
        arguments=call_arguments(
            path, args.pipeline_args,
            num_inference_steps=None if steps is None else number_of_steps(steps),
            guidance_scale=args.cfg_scale),
        dtype=args.dtype,
        run=run,
    )


def _class_of(folder: Path) -> str:
    index = read_index(folder)
    kind = str(index.get("_class_name"))
    if COMPONENT not in index:
        raise UserError(f"'{folder}' is a {kind} without a {COMPONENT}: "
                        "expected the folder of a pipeline with a diffusion transformer")
    return kind
