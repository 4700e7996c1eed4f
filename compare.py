"""Quantise one model with several recipes and bit widths, sample, judge: one table, as text, CSV, Markdown and pictures.

    python compare.py --model DiT-Digits-Outliers --report results/report         # bundled, runs on two CPU cores
    python compare.py --model DiT-Digits-Outliers --recipes rtn ditas ditas:lowrank=0 ditas:group-size=32 --bits W4A8 W8A8
    # the ablation of the DiTAS paper: naive, + TAS, + grid search, + low rank
    python compare.py --model DiT-Digits-Outliers --recipes rtn rtn:balance=tas,alpha=0.5 rtn:balance=tas,alpha=grid \\
        rtn:balance=tas,alpha=grid,lowrank=paper
    # table 4 of Q-DiT: round to nearest, + groups, + dynamic activations, + allocation; then + GPTQ
    python compare.py --model DiT-Digits-Outliers --recipes \\
        qdit:weight=nearest,weight-granularity=channel,act-granularity=tensor,act-range=static,group-sizes=none \\
        qdit:weight=nearest,act-granularity=tensor,act-range=static,group-sizes=none,group-size=64 \\
        qdit:weight=nearest,group-sizes=none,group-size=64 qdit:weight=nearest,population=10,generations=4 qdit:population=10,generations=4
    python compare.py --model DiT-XL/2 --image-size 256 512 --num-sampling-steps 50 100 --bits W8A8 W6A8 W4A8 --num-fid-samples 10000 \\
        --reference VIRTUAL_imagenet256_labeled.npz VIRTUAL_imagenet512.npz --nproc 8
"""
import argparse
import csv
import hashlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import config
import QuantDiT
from cli.parser import Parser, find_card, run
from cli.recipe_flags import FLAGS, build_recipe
from cli.values import at_least, class_labels, one_of, user_value
from config import RECIPES
from diffusion import ddpm_step, make_schedule
from diffusion.generate import labels_for
from download import load_decoder, load_model
from errors import UserError
from evaluation import fidelity
from evaluation.features import ImageSet, load_set
from evaluation.networks import load_extractor, load_lpips, load_reference
from evaluation.scores import HEADINGS, Scores, cells, score
from files.atomic import atomic, file_stem, writable_folder
from files.digests import sha256
from files.npz import read_arrays, read_images
from models import ModelCard
from quant import checkpoint
from quant.balancing.maxima import check_step
from quant.numerics.uniform import ACT_BITS, WEIGHT_BITS
from quant.recipe import check_recipe
from report import figures
from report.page import Figure, Section, html_table, write_page

SCRIPTS = Path(__file__).parent
LPIPS_SIZE = 64  # pixels per side that its network needs
SHOWN = 12  # images per row of the picture
OVERRIDES = (*(flag.name for flag in FLAGS), "svd", "class-labels")


@dataclass(frozen=True)
class Job:
    """A row to fill: a recipe with overrides (None: the float model) at one bit width, and the words QuantDiT.py gets for it."""

    label: str
    bits: str
    words: tuple[str, ...] | None

    @property
    def name(self) -> str:
        return file_stem(f"{self.label}-W{self.bits.replace('/', 'A')}")


@dataclass(frozen=True)
class Row:
    """A filled row; ``key`` is everything that decides its numbers."""

    label: str
    bits: str
    megabytes: float
    seconds: float | None
    scores: Scores
    fidelity: fidelity.Fidelity | None
    npz: str
    key: list[str]

    def cells(self) -> list[str]:
        near = self.fidelity
        return [self.label, self.bits, f"{self.megabytes:.1f}", "-" if self.seconds is None else f"{self.seconds:.0f}", *cells(self.scores),
                "-" if near is None else f"{near.sqnr_db[-1]:.1f}", "-" if near is None else f"{near.psnr_db:.1f}",
                "-" if near is None else "n/a" if near.lpips is None else f"{near.lpips:.4f}"]


COLUMNS = ["recipe", "W/A", "MB", "calibration s", *HEADINGS, "SQNR dB", "PSNR dB", "LPIPS"]


def default_recipes(steps: int, budgets: dict[str, str]) -> list[str]:
    """Every recipe; SmoothQuant at the first, middle and last step, as in figures 10 to 12 of the DiTAS paper's appendix.

    Args:
        budgets: flags of recipes whose published effort is meant for larger models.
    """
    smooth = [f"smoothquant:smooth-timestep={step}" for step in sorted({0, steps // 2, steps - 1})]
    sized = {recipe: [f"{recipe}:{budgets[recipe]}" if recipe in budgets else recipe] for recipe in RECIPES}
    return [name for recipe in RECIPES for name in (smooth if recipe == "smoothquant" else sized[recipe])]


def parse_job(recipe: str, bits: str, steps: int, num_classes: int) -> Job:
    """``recipe[:flag=value,…]`` and ``W4A8``; flags of QuantDiT.py that say how to quantise are allowed.

    Raises:
        UserError: unknown recipe, flag or bit width.
    """
    name, _, overrides = recipe.partition(":")
    one_of(name, RECIPES, "--recipes")
    match = re.fullmatch(r"W(\d+)A(\d+)", bits)
    if match is None:
        raise UserError(f"bad bit width '{bits}': expected W<weight bits>A<activation bits>, such as W4A8")
    weight, act = (int(number) for number in match.groups())
    one_of(weight, WEIGHT_BITS, "--bits: weight width")
    one_of(act, ACT_BITS, "--bits: activation width")
    words = ["--recipe", name, "--weight-bit", str(weight), "--act-bit", str(act)]
    for override in filter(None, overrides.split(",")):
        flag, equals, value = override.partition("=")
        if flag not in OVERRIDES or not equals:
            raise UserError(f"bad override '{override}' of recipe '{recipe}': expected {', '.join(OVERRIDES)}, as in ditas:lowrank=0")
        words += [f"--{flag}", value]
    args = QuantDiT.make_parser().parse_args(words)
    built = build_recipe(args)
    user_value(check_recipe, built, act)
    user_value(check_step, built.timestep, steps)
    if args.class_labels is not None:
        class_labels(args.class_labels, num_classes)
    return Job(recipe, f"{weight}/{act}", tuple(words))


class Comparison:
    """All rows of one model at one image size and number of steps."""

    def __init__(self, args: argparse.Namespace, card: ModelCard, image_size: int, steps: str, reference: Path):
        self.args, self.card, self.image_size, self.steps = args, card, image_size, steps
        self.schedule = user_value(make_schedule, steps)
        self.title = f"{args.model}, {image_size} pixels, {steps} steps"
        self.folder = writable_folder(Path(args.output) / f"{args.model.replace('/', '-')}-{image_size}-{steps}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.extractor = load_extractor(card.features, args.inception, self.device)
        self.reference_path = reference
        self._reference: ImageSet | None = None
        self._float_run: fidelity.Run | None = None
        self.perceptual = None
        if image_size >= LPIPS_SIZE:
            try:
                self.perceptual = load_lpips(self.device)
            except UserError as error:
                print(f"LPIPS is n/a: {error}", file=sys.stderr)

    def jobs(self) -> list[Job]:
        budgets = config.small_model_budgets if self.card.is_small else {}
        recipes = self.args.recipes or default_recipes(len(self.schedule), budgets)
        return [Job("float", "32/32", None), *(parse_job(recipe, bits, len(self.schedule), self.card.num_classes) for bits in self.args.bits for recipe in recipes)]

    def row(self, job: Job) -> Row:
        """Quantise, sample and judge; what an earlier call did with the same settings is kept, each of the three by itself."""
        args, folder = self.args, writable_folder(self.folder / job.name)
        source = ["--ckpt", args.ckpt] if args.ckpt else []
        model_words = ["--model", args.model, "--image-size", str(self.image_size), "--num-sampling-steps", self.steps, *source]
        path, seconds, quantise = folder / f"checkpoint{checkpoint.SUFFIX}", None, []
        if job.words is not None:
            judged = ["--reference", str(self.reference_path), *(["--inception", args.inception] if args.inception else [])] if "--judge" in job.words else []
            quantise = [*model_words, *job.words, *judged, "--seed", str(args.seed), "--vae", args.vae, "--output", str(path)]
            seconds = self.quantise(job, quantise, path)
        sample = model_words if job.words is None else ["--path", str(path), "--num-sampling-steps", self.steps]
        sample = [*sample, "--per-proc-batch-size", str(args.per_proc_batch_size), "--cfg-scale", repr(args.cfg_scale), "--global-seed",
                  str(args.global_seed), "--vae", args.vae, "--threads", str(args.threads), "--no-tf32", "--backend", "fake"]
        sample += ["--decode-batch-size", str(args.decode_batch_size)] if args.decode_batch_size else []
        made_from = [sha256(path)] if quantise else [identity(file) for file in source[1:]]
        images_key = [*quantise, *sample, *made_from, torch.__version__, self.device.type]
        key = [*images_key, str(args.num_fid_samples), identity(self.reference_path), self.extractor.name, args.pr_dtype, str(args.num_fidelity_samples)]
        if (done := read_row(folder / "row.json")) and done.key == key and Path(done.npz).is_file():
            print(f"{job.name}: done before, in {folder}", flush=True)
            return done
        place = folder / f"samples-{hashlib.sha256(json.dumps(images_key).encode()).hexdigest()[:8]}"  # other settings never meet its manifest
        npz = self.sample([*sample, "--num-fid-samples", str(args.num_fid_samples), "--sample-dir", str(place)], place)
        near = None if job.words is None or args.num_fidelity_samples == 0 else self.fidelity(path)
        scores = user_value(score, self.reference(), user_value(load_set, npz, self.extractor), args.pr_dtype == "float16", self.device)
        size = self.float_bytes() if job.words is None else path.stat().st_size
        done = Row(job.label, job.bits, size / 1e6, seconds, scores, near, str(npz), key)
        with atomic(folder / "row.json") as temporary:
            temporary.write_text(json.dumps(asdict(done), indent=1))
        return done

    def quantise(self, job: Job, words: list[str], path: Path) -> float:
        """Write the checkpoint unless it is there, and its report if one is wanted; returns the seconds it took."""
        note, report = path.with_suffix(".json"), self.report_folder(job)
        key = [*words, *map(identity, [self.args.ckpt] if self.args.ckpt else [])]
        with suppress(OSError, ValueError, KeyError):
            stored = json.loads(note.read_text())
            if stored["key"] == key and path.is_file() and (report is None or (report / "report.html").is_file()):
                return stored["seconds"]
        note.unlink(missing_ok=True)
        words = [*words, *(["--report", str(report)] if report else []), *(["--report-layers", self.args.report_layers] if self.args.report_layers else [])]
        print(f"\n$ python QuantDiT.py {shlex.join(words)}", flush=True)
        seconds = QuantDiT.main(QuantDiT.make_parser().parse_args(words))
        with atomic(note) as temporary:
            temporary.write_text(json.dumps({"key": key, "seconds": seconds}))
        return seconds

    def report_folder(self, job: Job) -> Path | None:
        return Path(self.args.report) / self.folder.name / job.name if self.args.report else None

    def sample(self, words: list[str], folder: Path) -> Path:
        """Run the sampling script on ``--nproc`` processes; returns the ``.npz``."""
        launcher = [] if self.args.nproc == 1 else ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={self.args.nproc}"]
        command = [*launcher, str(SCRIPTS / "sample_merge_TAS.py"), *words]
        print(f"\n$ python {shlex.join(command)}", flush=True)
        if status := subprocess.run([sys.executable, *command]).returncode:
            raise UserError(f"sampling ended with status {status}: see above, then run the same command again")
        return next(folder.glob("*.npz"))

    def reference(self) -> ImageSet:
        if self._reference is None:
            cache = os.access(self.reference_path.parent, os.W_OK)
            self._reference = user_value(partial(load_set, cache=cache), self.reference_path, self.extractor)
            if (size := self._reference.size) not in (None, (self.image_size,) * 2):
                raise UserError(f"images of '{self.reference_path}' are {size[0]}x{size[1]}, expected {self.image_size}x{self.image_size}: "
                                "give another --reference")
        return self._reference

    def load_float(self) -> nn.Module:
        return load_model(self.args.model, self.card, self.image_size, self.card.num_classes, self.args.ckpt, self.device)

    def float_bytes(self) -> int:
        return sum(4 * parameter.numel() for parameter in self.load_float().parameters())

    def run(self, model: nn.Module) -> fidelity.Run:
        count = self.args.num_fidelity_samples
        labels = labels_for(range(count), self.args.global_seed, model.num_classes, None).tolist()
        return fidelity.sample_run(model, load_decoder(self.card, self.args.vae, self.device), self.schedule, labels, self.args.global_seed,
                            self.args.cfg_scale, ddpm_step, self.args.decode_batch_size or self.args.per_proc_batch_size)

    def fidelity(self, path: Path) -> fidelity.Fidelity:
        """Against the float model, on the first images of the sample."""
        if self._float_run is None:
            self._float_run = self.run(self.load_float())
        return fidelity.compare_runs(self._float_run, self.run(checkpoint.load(path, self.device, folded=True)[1]), self.perceptual)

    def describe(self) -> str:
        args = self.args
        return " ".join(filter(None, (
            f"Guidance {args.cfg_scale:g}, {args.num_fid_samples} images, seed {args.global_seed}; features {self.extractor.name}, reference "
            f"{self.reference_path.name} (N = {self.reference().count or 'n/a'}); SQNR, PSNR and LPIPS against the float model with the same noise, "
            f"{args.num_fidelity_samples} images.", self.card.origin)))


def identity(path: str | Path) -> str:
    """Of a file, as far as a look at its size and time tells."""
    return f"{path} {Path(path).stat().st_size} {Path(path).stat().st_mtime_ns}" if Path(path).exists() else str(path)


def read_row(path: Path) -> Row | None:
    """A row that ``Comparison.row`` wrote; None where there is none."""
    try:
        stored = json.loads(path.read_text())
        near = stored.pop("fidelity")
        return Row(**{**stored, "scores": Scores(**stored["scores"])}, fidelity=near and fidelity.Fidelity(**near))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def pictures(comparison: Comparison, rows: list[Row]) -> list[Figure]:
    """The same seeds from every row, and the distance from the float model along the trajectory."""
    images = {f"{row.label} {row.bits}": read_images(Path(row.npz), read_arrays(Path(row.npz)))[:SHOWN] for row in rows}
    made = [Figure(f"{comparison.folder.name}-same-seeds", figures.same_seeds(images), "The same seeds from every row (figures 9 to 13 of the paper's appendix).")]
    curves = {f"{row.label} {row.bits}": row.fidelity.sqnr_db for row in rows if row.fidelity is not None}
    if curves:
        made.append(Figure(f"{comparison.folder.name}-sqnr", figures.sqnr_over_steps(curves), "SQNR of the latents against the float model's, after each step."))
    return made


def main(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and not without the sampling process
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    card = find_card(args.model)
    args.nproc = (torch.cuda.device_count() or os.cpu_count() or 1) if args.nproc is None else args.nproc
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // max(1, args.nproc))
    sizes = args.image_size or [card.image_sizes[0]]
    for flag, minimum in (("num_fid_samples", 4), ("per_proc_batch_size", 1), ("nproc", 1), ("num_fidelity_samples", 0), ("cfg_scale", 1.0),
                          ("global_seed", 0), ("seed", 0), ("threads", 1), ("decode_batch_size", 1)):
        if getattr(args, flag) is None:
            continue
        at_least(getattr(args, flag), minimum, f"--{flag.replace('_', '-')}")
    for size in sizes:
        one_of(size, card.image_sizes, "--image-size")
    if args.reference is not None and len(args.reference) != len(sizes):
        raise UserError(f"--reference has {len(args.reference)} files and --image-size {len(sizes)} sizes: expected one file per size")
    output = writable_folder(Path(args.output))
    references = [load_reference(card, given, output) for given in args.reference or [None] * len(sizes)]
    comparisons = [Comparison(args, card, size, steps, reference) for size, reference in zip(sizes, references) for steps in args.num_sampling_steps]
    for comparison in comparisons:
        comparison.jobs()  # a wrong recipe or reference is found before any work is done
        comparison.reference()

    texts, table, sections = [], [], []
    for comparison in comparisons:
        rows = [comparison.row(job) for job in comparison.jobs()]
        lines = [row.cells() for row in rows]
        texts.append(f"### {comparison.title}\n\n{comparison.describe()}\n\n{markdown(COLUMNS, lines)}\n")
        table += [[args.model, str(comparison.image_size), comparison.steps, *line] for line in lines]
        if args.report:
            sections.append(Section(comparison.title, html_table(COLUMNS, lines), pictures(comparison, rows)))
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["model", "image size", "steps", *COLUMNS], *table])
    for name, text in (("table.md", "\n".join(texts)), ("table.csv", buffer.getvalue())):
        with atomic(output / name) as temporary:
            temporary.write_text(text, "utf-8")
    print("\n" + "\n".join(texts))
    print(f"wrote {output / 'table.md'} and {output / 'table.csv'}")
    if args.report:
        page = write_page(writable_folder(Path(args.report)), f"Comparison of recipes on {args.model}", comparisons[0].describe(), sections)
        print(f"wrote {page}; every row's own report is in a folder beside it")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=config.default_model, help=f"as in QuantDiT.py (default: {config.default_model})")
    parser.add_argument("--image-size", type=int, nargs="+", help="one or several (default: the model's first)")
    parser.add_argument("--num-sampling-steps", nargs="+", default=["50"], help="of calibration and sampling, one or several (default: 50)")
    parser.add_argument("--recipes", nargs="+", metavar="RECIPE[:FLAG=VALUE,…]",
                        help="rows, with flags of QuantDiT.py on top (default: every recipe, smoothquant at three steps, searches scaled to small models)")
    parser.add_argument("--bits", nargs="+", default=["W4A8"], metavar="W<w>A<a>", help="bit widths of every recipe (default: W4A8)")
    parser.add_argument("--num-fid-samples", type=int, default=400, help="images per row (default: 400)")
    parser.add_argument("--num-fidelity-samples", type=int, default=32, help="images per row compared with the float model's, 0 for none (default: 32)")
    parser.add_argument("--per-proc-batch-size", type=int, default=50, help="images in a batch (default: 50)")
    parser.add_argument("--decode-batch-size", type=int, help="latents the VAE decodes at once (default: the whole batch)")
    parser.add_argument("--threads", type=int, help="CPU threads per sampling process (default: all cores, shared)")
    parser.add_argument("--nproc", type=int, help="sampling processes (default: one per GPU, or one per core, which is several times faster than one on all cores)")
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="guidance of the samples (default: 1.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration noise (default: 0)")
    parser.add_argument("--global-seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--ckpt", help="float weights (default: the published or bundled ones)")
    parser.add_argument("--vae", choices=("ema", "mse"), default="ema")
    parser.add_argument("--reference", nargs="+", help=".npz of real images, one per image size (default: the bundled model's data)")
    parser.add_argument("--inception", help="Inception weights (default: fetched on first use)")
    parser.add_argument("--pr-dtype", choices=("float32", "float16"), default="float32", help="see evaluate.py")
    parser.add_argument("--output", default="results/compare", help="folder of checkpoints, samples and tables; finished rows are kept (default: results/compare)")
    parser.add_argument("--report-layers", help="as in QuantDiT.py")
    parser.add_argument("--report", metavar="DIR", help="draw figures into this folder, with a page report.html per row and one for all")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
