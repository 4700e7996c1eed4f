"""Quantise one model with several recipes and bit widths, sample, judge: one table.

It is printed and written as Markdown and CSV, with --report also as pictures.

    # the bundled model, on two CPU cores
    python compare.py --model DiT-Digits-Outliers --report results/report
    python compare.py --model DiT-Digits-Outliers \\
        --recipes rtn ditas ditas:lowrank=0 ditas:group-size=32 --bits W4A8 W8A8

    # the ablation of the DiTAS paper: naive, + TAS, + grid search, + low rank
    python compare.py --model DiT-Digits-Outliers --recipes rtn \\
        rtn:balance=tas,alpha=0.5 \\
        rtn:balance=tas,alpha=grid \\
        rtn:balance=tas,alpha=grid,lowrank=paper

    # tables 1, 2, 5 and 6 of Q-DiT stand in docs/recipes.md, with the same flags for DiT-XL/2

    # table 4 of Q-DiT: round to nearest, + groups, + dynamic activations, + allocation, + GPTQ
    NEAREST=qdit:weight=nearest
    STATIC=act-granularity=tensor,act-range=static,group-sizes=none
    SMALL=population=10,generations=4
    python compare.py --model DiT-Digits-Outliers --recipes \\
        $NEAREST,weight-granularity=channel,$STATIC \\
        $NEAREST,$STATIC,group-size=64 \\
        $NEAREST,group-sizes=none,group-size=64 \\
        $NEAREST,$SMALL \\
        qdit:$SMALL

    # the published model at both of its sizes
    python compare.py --model DiT-XL/2 --image-size 256 512 --num-sampling-steps 50 100 \\
        --bits W8A8 W6A8 W4A8 --num-fid-samples 10000 --nproc 8 \\
        --reference VIRTUAL_imagenet256_labeled.npz VIRTUAL_imagenet512.npz
"""
from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import argparse
import signal
import sys
from pathlib import Path

import torch

import config
from cli.parser import Parser, run
from comparison.rows import COLUMNS, Row, csv_text, markdown
from comparison.runner import Comparison
from comparison.settings import CompareSettings, compare_settings
from files.atomic import atomic, writable_folder
from report.comparison import comparison_section
from report.page import write_page


def main(args: argparse.Namespace) -> None:
    settings = compare_settings(args)
    end_with_the_sampling_process()
    # The numbers are to be those of full float32 products.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    # Find what is wrong with recipes and references before any work is done.
    comparisons = make_comparisons(settings)
    for comparison in comparisons:
        comparison.check_reference()

    # Fill the rows.
    texts, table, sections = [], [], []
    for comparison in comparisons:
        rows = [comparison.row(job) for job in comparison.jobs]
        texts.append(as_text(comparison, rows))
        table += as_table(comparison, rows)
        if settings.report is not None:
            sections.append(comparison_section(comparison.title, comparison.name, rows))

    # Show them.
    text = "\n".join(texts)
    markdown_file = write_text(settings.output / "table.md", text)
    header = ["model", "image size", "steps", "guidance", *COLUMNS]
    csv_file = write_text(settings.output / "table.csv", csv_text(header, table))
    print(f"\n{text}")
    print(f"wrote {markdown_file} and {csv_file}")
    if settings.report is not None:
        title = f"Comparison of recipes on {settings.model}"
        intro = comparisons[0].describe()
        page = write_page(writable_folder(settings.report), title, intro, sections)
        print(f"wrote {page}; every row's own report is in a folder beside it")


def end_with_the_sampling_process() -> None:
    """Make SIGTERM an ordinary exit, on which Python also ends a process that it waits for."""
    def leave(*_) -> None:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)


def make_comparisons(settings: CompareSettings) -> list[Comparison]:
    """Make a comparison for every image size, number of steps and guidance."""
    comparisons = []
    for image_size, reference in zip(settings.image_sizes, settings.references):
        for steps in settings.steps:
            for cfg_scale in settings.cfg_scales:
                comparisons.append(Comparison(settings, image_size, steps, cfg_scale, reference))
    return comparisons


def as_text(comparison: Comparison, rows: list[Row]) -> str:
    """Write a comparison's rows as Markdown, under a heading and what the numbers are."""
    lines = markdown(COLUMNS, [row.cells() for row in rows])
    return f"### {comparison.title}\n\n{comparison.describe()}\n\n{lines}\n"


def as_table(comparison: Comparison, rows: list[Row]) -> list[list[str]]:
    """Write a comparison's rows as lines of the table of all."""
    setting = [comparison.settings.model, str(comparison.image_size), comparison.steps,
               f"{comparison.cfg_scale:g}"]
    return [[*setting, *row.cells()] for row in rows]


def write_text(path: Path, text: str) -> Path:
    """Write a file that appears whole or not at all; returns its path."""
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_row_flags(parser)
    add_sampling_flags(parser)
    add_file_flags(parser)
    return parser


def add_row_flags(parser: Parser) -> None:
    """Add the flags that say what is compared."""
    parser.add_argument(
        "--model", default=config.default_model,
        help=f"as in QuantDiT.py (default: {config.default_model})")
    parser.add_argument(
        "--image-size", type=int, nargs="+",
        help="one or several (default: the model's first)")
    parser.add_argument(
        "--num-sampling-steps", nargs="+", default=["50"],
        help="of calibration and sampling, one or several (default: 50)")
    parser.add_argument(
        "--recipes", nargs="+", metavar="RECIPE[:FLAG=VALUE,…]",
        help="rows, with flags of QuantDiT.py on top (default: every recipe, "
             "smoothquant at three steps, searches scaled to small models)")
    parser.add_argument(
        "--bits", nargs="+", default=["W4A8"], metavar="W<w>A<a>",
        help="bit widths of every recipe (default: W4A8)")


def add_sampling_flags(parser: Parser) -> None:
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
        "--cfg-scale", type=float, nargs="+", default=[1.5],
        help="guidance of the samples, one or several; 1 is none (default: 1.5)")
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


def add_file_flags(parser: Parser) -> None:
    """Add the flags that say what is read and written."""
    parser.add_argument(
        "--ckpt",
        help="float weights (default: the published or bundled ones)")
    parser.add_argument("--vae", choices=("ema", "mse"), default="ema")
    parser.add_argument(
        "--reference", nargs="+",
        help=".npz of real images, one per image size (default: the bundled model's data)")
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


if __name__ == "__main__":
    run(main, make_parser())
