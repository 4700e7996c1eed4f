"""The command line of QuantDiT.py, which compare.py fills in too."""
import argparse
import sys

import config
from cli.parser import Parser, add_model_flags, add_threads_flag, make_script_parser
from cli.recipe_flags import add_recipe_flags
from config import RECIPES

# What a checkpoint can be exported to.
EXPORTS = ("diffusers",)
# What is read for the folder of a pipeline alone.
PIPELINE_FLAGS = ("prompts", "component", "include", "exclude", "pipeline_args", "offload")
# What else --model may be.
PIPELINES = ("or the folder or hub id of a diffusers pipeline (a file of float weights goes with "
             "--ckpt, a quantised checkpoint with --path)")
# The published QuantDiT.py accepts these and never reads them.
IGNORED = (
    "results-dir",
    "global-batch-size",
    "global-seed",
    "num-workers",
    "epochs",
    "per-proc-batch-size",
    "log-every",
    "ckpt-every",
)


def make_parser(description: str = "") -> Parser:
    """Make the parser of all flags; ``description`` stands above them in its help."""
    parser = make_script_parser(description)
    add_model_flags(parser, PIPELINES)
    parser.add_argument(
        "--recipe", default=config.default_recipe,
        help=f"one of {', '.join(RECIPES)} (default: {config.default_recipe})")
    parser.add_argument(
        "--seed", type=int, default=0,
        help="of the calibration noise and the picture (default: 0)")
    parser.add_argument(
        "--num-sampling-steps",
        help="steps of the calibration trajectory: 1 to 1000, 'ddimN' or a list (default: 50); "
             "of a pipeline a number (default: the folder's, or the pipeline's own)")
    parser.add_argument(
        "--cfg-scale", type=float,
        help="guidance of the picture (default: 4.0); "
             f"calibration always uses {config.calibration_cfg_scale}")
    parser.add_argument(
        "--class-labels",
        help="classes to calibrate on, separated by commas (default: the paper's 16, or 0 1 2 …)")
    parser.add_argument(
        "--svd", choices=("exact", "fast"), default="fast",
        help="how the low-rank branch is found (default: fast)")
    _add_output_flags(parser)
    _add_pipeline_flags(parser)
    add_threads_flag(parser)
    add_recipe_flags(parser)
    _add_ignored_flags(parser)
    return parser


def _add_pipeline_flags(parser: Parser) -> None:
    """Add the flags for a folder of a diffusers pipeline."""
    group = parser.add_argument_group(
        "with --model FOLDER of a text-to-image pipeline of diffusers")
    group.add_argument(
        "--prompts", metavar="FILE",
        help="prompts to calibrate on, one a line; they become those of the folder that is "
             "written (default: the folder's, or 32 of our own)")
    group.add_argument(
        "--component",
        help="what is quantised (default: transformer)")
    group.add_argument(
        "--include", metavar="REGEX", help="linears that are quantised whatever the scope")
    group.add_argument(
        "--exclude", metavar="REGEX",
        help="linears that are not, nor those that share an input with them")
    group.add_argument(
        "--offload", action="store_true",
        help="keep the pipeline on the CPU; what runs is on the GPU only while it does, the "
        "transformer block by block")
    group.add_argument(
        "--pipeline-args", metavar="JSON",
        help="more arguments of the pipeline's call, such as '{\"guidance_scale\": 3.5}'")


def _add_ignored_flags(parser: Parser) -> None:
    """Add the flags that the published command line has and that change nothing."""
    group = parser.add_argument_group(
        "accepted with a warning, without effect here as in the published script",
        ", ".join(f"--{name}" for name in IGNORED))
    for name in IGNORED:
        group.add_argument(f"--{name}", help=argparse.SUPPRESS)


def warn_of_ignored_flags(args: argparse.Namespace) -> None:
    """Say in one line on stderr which of the given flags have no effect."""
    given = [name for name in IGNORED if getattr(args, name.replace("-", "_")) is not None]
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        print(f"warning: {flags}: no effect, here as in the published QuantDiT.py",
              file=sys.stderr)


def _add_output_flags(parser: Parser) -> None:
    """Add the flags that say what is written, and what group sizes are judged by."""
    parser.add_argument(
        "--inspect", action="store_true",
        help="with --model FOLDER of a diffusers transformer or pipeline: print what would be "
             "quantised, where factors fold and how large it gets, then exit")
    parser.add_argument(
        "--report", metavar="DIR",
        help="draw figures of what quantisation did into this folder, with a page report.html")
    parser.add_argument(
        "--report-layers",
        help="layers whose inputs are drawn, separated by commas, such as blocks.9.mlp.fc2 "
             "(default: the last fc2 and qkv)")
    parser.add_argument(
        "--reference",
        help="with --judge fid or fvd: .npz of real images or videos "
             "(default: the bundled model's data)")
    parser.add_argument(
        "--inception",
        help="with --judge fid: Inception weights (default: fetched on first use)")
    parser.add_argument(
        "--i3d", metavar="FILE",
        help="with --judge fvd: TorchScript of a video network (default: the digits' "
             "stand-in)")
    parser.add_argument(
        "--export", choices=EXPORTS,
        help="write the checkpoint as the folder of a diffusers pipeline, too "
             "(<output>-diffusers)")
    parser.add_argument(
        "--path", metavar="FILE",
        help="with --export: a checkpoint that is there; nothing is quantised, and --output is "
             "the folder")
    parser.add_argument(
        "--output",
        help="where to write (default: results/<model>-<size>-W<w>A<a>-<recipe>.safetensors, "
             "with the recipe's flags; of a pipeline a folder, results/<name>-W<w>A<a>-<recipe>)")
