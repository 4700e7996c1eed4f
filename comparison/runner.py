"""Fills the rows of a comparison: quantise, sample, judge; what is done is kept."""
import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from cli.values import user_value
from comparison.jobs import FLOAT, Job, default_recipes, parse_job
from comparison.judging import ImageJudge, load_float
from comparison.kept import KeptStep, file_identity
from comparison.quantdit import quantize
from comparison.rows import Row
from comparison.settings import CompareSettings
from diffusion import make_schedule
from diffusion.generate import Sampling
from errors import UserError
from files.atomic import writable_folder
from files.digests import sha256
from quant import checkpoint
from quant.checkpoint.size import counted_bytes, float_bytes

SAMPLING_SCRIPT = Path(__file__).parents[1] / "sample_merge_TAS.py"
# Floating point on every machine alike, so that rows differ by their recipes alone.
SAMPLING_ARITHMETIC = {"tf32": False, "backend": "fake"}


@dataclass(frozen=True)
class Quantised:
    """A quantised model.

    Attributes:
        arguments: what QuantDiT.py was given.
        path: the checkpoint.
        seconds: that quantisation took.
        search_seconds: of these the choice of group sizes; None where there was none.
    """

    arguments: list[str]
    path: Path
    seconds: float
    search_seconds: float | None


class Comparison:
    """All rows of one model at one image size, number of steps and guidance.

    Attributes:
        name: of its figures.
        title: of its table.
        jobs: the rows to fill.

    Raises:
        UserError: unknown recipe, flag, bit width or steps, or a file that cannot be had.
    """

    def __init__(
        self,
        settings: CompareSettings,
        image_size: int,
        steps: str,
        cfg_scale: float,
        reference: Path,
    ):
        self.settings = settings
        self.image_size = image_size
        self.steps = steps
        self.cfg_scale = cfg_scale
        self.title = (
            f"{settings.model}, {image_size} pixels, {steps} steps, guidance {cfg_scale:g}")
        # Checkpoints do not depend on the guidance, so that folders do not.
        self._place = f"{settings.model.replace('/', '-')}-{image_size}-{steps}"
        self.name = f"{self._place}-{cfg_scale:g}"
        sampling = Sampling(
            user_value(make_schedule, steps), settings.global_seed, cfg_scale, settings.sampler,
            settings.eta)
        self.jobs = parse_jobs(settings, len(sampling.schedule))
        self._folder = writable_folder(settings.output / self._place)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._judge = ImageJudge(settings, image_size, sampling, reference, self._device)

    def check_reference(self) -> None:
        """Check the real images, before any work is done.

        Raises:
            UserError: they cannot be read, or are of another size.
        """
        self._judge.check_reference()

    def row(self, job: Job) -> Row:
        """Quantise, sample and judge.

        What an earlier call did with the same settings is kept, each of the three by itself.
        """
        folder = writable_folder(self._folder / job.name)
        quantised = None if job.arguments is None else self.quantise(job, folder)
        sampling = self._sampling_arguments(quantised)
        images_key = self._images_key(quantised, sampling)
        note = folder / f"row-{self.cfg_scale:g}.json"
        step = KeptStep(note, self._row_key(images_key), [])
        kept = read_row(step)
        if kept is not None:
            print(f"{job.name}: done before, in {folder}", flush=True)
            return kept

        # Images of other settings have another folder, so that they never meet its manifest.
        digest = hashlib.sha256(json.dumps(images_key).encode()).hexdigest()
        images = self.sample(sampling, folder / f"samples-{digest[:8]}")
        row = self.judge(job, quantised, images)
        step.keep(**row.as_note())
        return row

    def quantise(self, job: Job, folder: Path) -> Quantised:
        """Write a checkpoint, and its report if one is wanted, unless both are there."""
        path = folder / f"checkpoint{checkpoint.SUFFIX}"
        arguments = self._quantising_arguments(job, path)
        results, report = [path], None
        if self.settings.report is not None:
            report = self.settings.report / self._place / job.name
            results.append(report / "report.html")
        step = KeptStep(path.with_suffix(".json"), [*arguments, *self._ckpt_identity()], results)
        note = step.load()
        if note is not None and {"seconds", "search_seconds"} <= note.keys():
            return Quantised(arguments, path, note["seconds"], note["search_seconds"])

        # The old note has to go first: an interruption must not leave it beside a new checkpoint.
        step.forget()
        pages = flags(report=report, report_layers=self.settings.report_layers)
        command = [*arguments, *pages]
        print(f"\n$ python QuantDiT.py {shlex.join(command)}", flush=True)
        made = quantize(command)
        step.keep(seconds=made.seconds, search_seconds=made.search_seconds)
        return Quantised(arguments, path, made.seconds, made.search_seconds)

    def sample(self, arguments: list[str], folder: Path) -> Path:
        """Run the sampling script on ``--nproc`` processes; returns the ``.npz``.

        A folder that an earlier call filled in part is completed.
        """
        launcher = []
        if self.settings.nproc > 1:
            launcher = [
                "-m", "torch.distributed.run", "--nnodes=1",
                f"--nproc_per_node={self.settings.nproc}"]
        amount = flags(num_fid_samples=self.settings.num_fid_samples, sample_dir=folder)
        command = [*launcher, str(SAMPLING_SCRIPT), *arguments, *amount]
        print(f"\n$ python {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, *command]).returncode
        if status:
            raise UserError(
                f"sampling ended with status {status}: "
                "see above, then run the same command again")
        return next(folder.glob("*.npz"))

    def judge(self, job: Job, quantised: Quantised | None, images: Path) -> Row:
        """Measure the images of a row."""
        fidelity = None
        if quantised is not None and self.settings.num_fidelity_samples > 0:
            fidelity = self._judge.fidelity(quantised.path)
        if quantised is None:
            size, counted = self._float_sizes()
        else:
            size = quantised.path.stat().st_size
            counted = counted_bytes(checkpoint.read_header(quantised.path))
        return Row(
            label=job.label,
            bits=job.bits,
            megabytes=size / 1e6,
            paper_megabytes=counted / 1e6,
            seconds=None if quantised is None else quantised.seconds,
            search_seconds=None if quantised is None else quantised.search_seconds,
            seconds_per_image=self._judge.seconds_per_image(
                None if quantised is None else quantised.path),
            scores=self._judge.scores(images),
            fidelity=fidelity,
            npz=str(images))

    def describe(self) -> str:
        """Say what the numbers of the table are."""
        settings = self.settings
        sentences = (
            f"Guidance {self.cfg_scale:g}, {settings.sampler}, "
            f"{settings.num_fid_samples} images, seed {settings.global_seed}; "
            f"features {self._judge.features}, reference {self._judge.reference_path.name} "
            f"(N = {self._judge.reference.count or 'n/a'}); "
            "SQNR, PSNR and LPIPS against the float model with the same noise, "
            f"{settings.num_fidelity_samples} images; s/image: sampling without decoding, "
            "on integers where that is possible.",
            settings.card.origin,
        )
        return " ".join(filter(None, sentences))

    def _model_arguments(self) -> list[str]:
        return flags(
            model=self.settings.model,
            image_size=self.image_size,
            num_sampling_steps=self.steps,
            ckpt=self.settings.ckpt)

    def _quantising_arguments(self, job: Job, path: Path) -> list[str]:
        settings = self.settings
        files = []
        # Other judges look at no images.
        if "fid" in job.arguments:
            files = flags(reference=self._judge.reference_path, inception=settings.inception)
        rest = flags(seed=settings.seed, vae=settings.vae, output=path)
        return [*self._model_arguments(), *job.arguments, *files, *rest]

    def _sampling_arguments(self, quantised: Quantised | None) -> list[str]:
        settings = self.settings
        if quantised is None:
            source = self._model_arguments()
        else:
            source = flags(path=quantised.path, num_sampling_steps=self.steps)
        rest = flags(
            per_proc_batch_size=settings.per_proc_batch_size,
            cfg_scale=self.cfg_scale,
            sampler=settings.sampler,
            eta=settings.eta,
            global_seed=settings.global_seed,
            vae=settings.vae,
            threads=settings.threads,
            **SAMPLING_ARITHMETIC,
            decode_batch_size=settings.decode_batch_size)
        return [*source, *rest]

    def _images_key(self, quantised: Quantised | None, sampling: list[str]) -> list[str]:
        """Everything that decides the images of a row but their number."""
        machine = [torch.__version__, self._device.type]
        if quantised is None:
            return [*sampling, *self._ckpt_identity(), *machine]
        return [*quantised.arguments, *sampling, sha256(quantised.path), *machine]

    def _row_key(self, images_key: list[str]) -> list[str]:
        """Everything that decides the numbers of a row."""
        return [
            *images_key,
            str(self.settings.num_fid_samples),
            file_identity(self._judge.reference_path),
            self._judge.features,
            self.settings.pr_dtype,
            str(self.settings.num_fidelity_samples),
        ]

    def _ckpt_identity(self) -> list[str]:
        return [] if self.settings.ckpt is None else [file_identity(self.settings.ckpt)]

    def _float_sizes(self) -> tuple[int, int]:
        """Count the bytes of the float weights, and what Q-DiT counts of them at float16."""
        model = load_float(self.settings, self.image_size, self._device)
        return sum(4 * parameter.numel() for parameter in model.parameters()), float_bytes(model)


def parse_jobs(settings: CompareSettings, steps: int) -> list[Job]:
    """List the rows to fill: the float model, then every recipe at every bit width.

    Raises:
        UserError: unknown recipe, flag or bit width.
    """
    card = settings.card
    budgets = config.small_model_budgets if card.is_small else {}
    recipes = settings.recipes or default_recipes(steps, budgets)
    jobs = [FLOAT]
    for bits in settings.bits:
        jobs += [parse_job(recipe, bits, steps, card.num_classes) for recipe in recipes]
    return jobs


def flags(**values) -> list[str]:
    """Write a command line: ``flags(cfg_scale=1.5, tf32=False, vae=None)``.

    That one is ``--cfg-scale 1.5 --no-tf32``.
    """
    arguments = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments


def read_row(step: KeptStep) -> Row | None:
    """Read a finished row whose images are still there; None where there is none."""
    note = step.load()
    row = None if note is None else Row.from_note(note)
    return row if row is not None and Path(row.npz).is_file() else None
