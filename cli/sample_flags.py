"""The command line of sample_merge_TAS.py."""
import argparse

import config
from cli.parser import Parser, add_model_flags, add_threads_flag, make_script_parser

# What is read for the folder of a pipeline alone.
PIPELINE_FLAGS = ("prompts", "pipeline_args")

# What goes elsewhere than with --model.
QUANTISED = ("while a quantised checkpoint, or the folder of a pipeline, goes with --path "
             "(and a file of float weights with --ckpt)")


def make_parser(description: str) -> Parser:
    """Make the parser of all flags; ``description`` stands above them in its help."""
    parser = make_script_parser(description)
    add_model_flags(parser, QUANTISED)
    _add_folder_flags(parser)
    _add_image_flags(parser)
    _add_arithmetic_flags(parser)
    _add_pipeline_flags(parser)
    return parser


def _add_folder_flags(parser: Parser) -> None:
    """Add the flags that say which images are made, by whom, and where they go."""
    parser.add_argument(
        "--path",
        help="quantised checkpoint written by QuantDiT.py, or the folder of a pipeline "
             "(default: sample the float model)")
    parser.add_argument(
        "--num-fid-samples", type=int, default=50_000,
        help="how many images; may grow later (default: 50000)")
    parser.add_argument(
        "--per-proc-batch-size", type=int, default=64,
        help="images in a batch; part of what fixes an image's bytes (default: 64)")
    parser.add_argument(
        "--decode-batch-size", type=int,
        help="latents the VAE decodes at once (default: the whole batch)")
    parser.add_argument(
        "--sample-dir", default="samples",
        help="where folders of images go (default: samples)")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete what the folder holds and start anew")
    parser.add_argument(
        "--shard", metavar="k/K",
        help="make only every K-th batch, beginning with the k-th (0 to K-1); no .npz")
    parser.add_argument(
        "--assemble", action="store_true",
        help="make no image, only the .npz of those that are there")
    parser.add_argument(
        "--log-file",
        help="append a line whenever images were made: time, images done, images per second")


def _add_image_flags(parser: Parser) -> None:
    """Add the flags that say what the images show."""
    parser.add_argument(
        "--cfg-scale", type=float,
        help="classifier-free guidance, 1 for none (default: 1.5, or the pipeline's own)")
    parser.add_argument(
        "--num-sampling-steps",
        help="1 to 1000, 'ddimN' or a list (default: the checkpoint's, or 50); of a pipeline a "
             "number (default: the folder's, or the pipeline's own)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm")
    parser.add_argument(
        "--eta", type=float, default=0.0,
        help="of ddim: 0 is deterministic (default), 1 as noisy as ddpm")
    parser.add_argument(
        "--class-labels", default="random", metavar="random|balanced|LIST",
        help="random (default), balanced: image i is of class i modulo their number, "
             "or classes separated by commas, used in turn")
    parser.add_argument(
        "--global-seed", type=int, default=0,
        help="with an image's index, all that its noise depends on (default: 0)")


def _add_arithmetic_flags(parser: Parser) -> None:
    """Add the flags that say how the model computes."""
    parser.add_argument(
        "--tf32", action=argparse.BooleanOptionalAction, default=True,
        help="TF32 matrix products on NVIDIA GPUs (default: on)")
    parser.add_argument(
        "--fold", action=argparse.BooleanOptionalAction, default=True,
        help="fold the smoothing factors (default: on)")
    parser.add_argument(
        "--backend", choices=config.BACKENDS, default="auto",
        help="fake simulates, integer computes on int8, auto (default) times both "
             "where checkpoint and processor allow integers")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="of all that is not integer (default: float32; of a pipeline on a GPU bfloat16)")
    parser.add_argument(
        "--compile", action="store_true",
        help="fuse what lies around the products; takes a minute at the start")
    parser.add_argument(
        "--cpu-weights", choices=("expanded", "packed"), default="expanded",
        help="of --backend integer on a CPU: int8 (default), "
             "or kept at 4 bits, smaller and slower; same images")
    add_threads_flag(parser, "; part of what fixes an image's bytes on a CPU")


def _add_pipeline_flags(parser: Parser) -> None:
    """Add the flags for a folder of a diffusers pipeline."""
    group = parser.add_argument_group(
        "with --path FOLDER of a text-to-image pipeline of diffusers")
    group.add_argument(
        "--prompts", metavar="FILE",
        help="one a line; image i shows number i modulo their number "
             "(default: the folder's, or 32 of our own)")
    group.add_argument(
        "--pipeline-args", metavar="JSON",
        help="more arguments of the pipeline's call, such as '{\"height\": 512}'")
