"""The command line of compare.py."""
import config
from cli.parser import Parser, make_script_parser

# What a folder's rows are, if the command line does not say.
PIPELINE_RECIPES = ("rtn", "smoothquant", "ditas", "ditas-plus")
# What is read for the folder of a pipeline alone.
PIPELINE_FLAGS = ("prompts", "calibration_prompts", "pipeline_args", "clip")
# What else --model may be.
PIPELINES = ("or the folder or hub id of a diffusers pipeline "
             "(a file of float weights goes with --ckpt)")


def make_parser(description: str) -> Parser:
    """Make the parser of all flags; ``description`` stands above them in its help."""
    parser = make_script_parser(description)
    _add_row_flags(parser)
    _add_sampling_flags(parser)
    _add_file_flags(parser)
    _add_pipeline_flags(parser)
    return parser


def _add_row_flags(parser: Parser) -> None:
    """Add the flags that say what is compared."""
    parser.add_argument(
        "--model", default=config.default_model,
        help="as in QuantDiT.py, or a text-to-image pipeline of diffusers: its folder or hub id "
             f"(default: {config.default_model})")
    parser.add_argument(
        "--image-size", type=int, nargs="+",
        help="one or several (default: the model's first)")
    parser.add_argument(
        "--num-sampling-steps", nargs="+",
        help="of calibration and sampling, one or several "
             f"(default: {config.sampling_steps}; of a pipeline its folder's, or its own)")
    parser.add_argument(
        "--recipes", nargs="+", metavar="RECIPE[:FLAG=VALUE,…]",
        help="rows, with flags of QuantDiT.py on top (default: every recipe, "
             "smoothquant at three steps, searches scaled to small models; "
             f"of a pipeline {' '.join(PIPELINE_RECIPES)})")
    parser.add_argument(
        "--bits", nargs="+", default=["W4A8"], metavar="W<w>A<a>",
        help="bit widths of every recipe (default: W4A8)")


def _add_sampling_flags(parser: Parser) -> None:
    """Add the flags that say what is sampled, and how."""
    parser.add_argument(
        "--num-fid-samples", type=int, default=400,
        help="images per row (default: 400)")
    parser.add_argument(
        "--num-fidelity-samples", type=int, default=32,
        help="images per row compared with the float model's, 0 for none (default: 32)")
    parser.add_argument(
        "--per-proc-batch-size", type=int, default=50,
        help="images in a batch (default: 50)")
    parser.add_argument(
        "--decode-batch-size", type=int,
        help="latents the VAE decodes at once (default: the whole batch)")
    parser.add_argument(
        "--threads", type=int,
        help="CPU threads per sampling process (default: all cores, shared)")
    parser.add_argument(
        "--nproc", type=int,
        help="sampling processes (default: one per GPU, or one per core, "
             "which is several times faster than one on all cores)")
    parser.add_argument(
        "--cfg-scale", type=float, nargs="+",
        help="guidance of the samples, one or several; 1 is none "
             f"(default: {config.sampling_cfg_scale}, or the pipeline's own)")
    parser.add_argument(
        "--sampler", choices=("ddpm", "ddim"), default="ddpm",
        help="as in sample_merge_TAS.py; calibration always samples by DDPM (default: ddpm)")
    parser.add_argument(
        "--eta", type=float, default=0.0,
        help="of --sampler ddim: 0 is deterministic (default: 0)")
    parser.add_argument(
        "--seed", type=int, default=0,
        help="of the calibration noise (default: 0)")
    parser.add_argument(
        "--global-seed", type=int, default=0,
        help="of the samples (default: 0)")


def _add_file_flags(parser: Parser) -> None:
    """Add the flags that say what is read and written."""
    parser.add_argument(
        "--ckpt",
        help="float weights (default: the published or bundled ones)")
    parser.add_argument("--vae", choices=("ema", "mse"), default="ema")
    parser.add_argument(
        "--reference", nargs="+",
        help=".npz of real images, one per image size "
             "(default: the bundled model's data; none for a pipeline)")
    parser.add_argument(
        "--inception",
        help="Inception weights (default: fetched on first use)")
    parser.add_argument(
        "--pr-dtype", choices=("float32", "float16"), default="float32",
        help="see evaluate.py")
    parser.add_argument(
        "--output", default="results/compare",
        help="folder of checkpoints, samples and tables; finished rows are kept "
             "(default: results/compare)")
    parser.add_argument(
        "--report-layers",
        help="as in QuantDiT.py")
    parser.add_argument(
        "--report", metavar="DIR",
        help="draw figures into this folder, with a page report.html per row and one for all")


def _add_pipeline_flags(parser: Parser) -> None:
    """Add the flags for a folder of a diffusers pipeline."""
    group = parser.add_argument_group(
        "with --model FOLDER of a text-to-image pipeline of diffusers")
    group.add_argument(
        "--prompts", metavar="FILE",
        help="what is drawn, one a line (default: the folder's, or 32 of our own)")
    group.add_argument(
        "--calibration-prompts", metavar="FILE",
        help="what recipes calibrate on (default: those of --prompts, with other noise)")
    group.add_argument(
        "--pipeline-args", metavar="JSON",
        help="more arguments of the pipeline's call, such as '{\"height\": 512}'")
    group.add_argument(
        "--clip", metavar="FOLDER",
        help="a CLIPModel with its processor, as transformers saves them: adds the CLIP score")
