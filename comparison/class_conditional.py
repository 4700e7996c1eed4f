"""A model of this repository, as what is compared."""
from pathlib import Path
from typing import Any

import config
from cli.quantize import QuantizedFile
from cli.values import user_value
from comparison.arguments import SAMPLING_ARITHMETIC, flags
from comparison.jobs import FLOAT, Job, check_job, default_recipes, parse_job
from comparison.judging import ImageJudge, default_device, load_float
from comparison.kept import file_identity
from comparison.rows import COLUMNS, Row
from comparison.settings import CompareSettings
from diffusion import make_schedule
from diffusion.generate import Sampling
from files.digests import sha256
from quant import checkpoint
from quant.checkpoint.size import counted_bytes, float_bytes


class ClassConditional:
    """A model at one image size, number of steps and guidance.

    Raises:
        UserError: unknown recipe, flag, bit width or steps, or a file that cannot be had.
    """

    columns = COLUMNS

    def __init__(
        self,
        settings: CompareSettings,
        image_size: int,
        steps: str,
        cfg_scale: float,
        reference: Path,
    ):
        self.settings = settings
        self.title = (
            f"{settings.model}, {image_size} pixels, {steps} steps, guidance {cfg_scale:g}")
        # Checkpoints do not depend on the guidance, so that folders do not.
        self.place = f"{settings.model.replace('/', '-')}-{image_size}-{steps}"
        self.name = f"{self.place}-{cfg_scale:g}"
        self.note = f"row-{cfg_scale:g}.json"
        self.setting = (settings.model, str(image_size), steps, f"{cfg_scale:g}")
        sampling = Sampling(
            user_value(make_schedule, steps), settings.global_seed, cfg_scale, settings.sampler,
            settings.eta)
        self.jobs = parse_jobs(settings, len(sampling.schedule))
        self._image_size = image_size
        self._steps = steps
        self._cfg_scale = cfg_scale
        self._judge = ImageJudge(settings, image_size, sampling, reference, default_device())

    def check_reference(self) -> None:
        self._judge.check_reference()

    def describe(self) -> str:
        settings = self.settings
        sentences = (
            f"Guidance {self._cfg_scale:g}, {settings.sampler}, "
            f"{settings.num_fid_samples} images, seed {settings.global_seed}; "
            f"features {self._judge.features}, reference {self._judge.reference_path.name} "
            f"(N = {self._judge.reference.count or 'n/a'}); "
            "SQNR, PSNR and LPIPS against the float model with the same noise, "
            f"{settings.num_fidelity_samples} images; s/image: sampling without decoding, "
            "on integers where that is possible.",
            settings.card.origin,
        )
        return " ".join(filter(None, sentences))

    def output(self, folder: Path) -> Path:
        return folder / f"checkpoint{checkpoint.SUFFIX}"

    def marker_file(self, output: Path) -> Path:
        return output

    def digest(self, output: Path) -> str:
        return sha256(output)

    def quantising_arguments(self, job: Job, output: Path) -> list[str]:
        settings = self.settings
        files = []
        # Other judges look at no images.
        if job.recipe.judge == "fid":
            files = flags(reference=self._judge.reference_path, inception=settings.inception)
        rest = flags(seed=settings.seed, vae=settings.vae, output=output)
        return [*self._model_arguments(), *job.arguments, *files, *rest]

    def report_arguments(self, folder: Path) -> list[str]:
        return flags(report=folder, report_layers=self.settings.report_layers)

    def sampling_arguments(self, output: Path | None) -> list[str]:
        settings = self.settings
        if output is None:
            source = self._model_arguments()
        else:
            source = flags(path=output, num_sampling_steps=self._steps)
        rest = flags(
            per_proc_batch_size=settings.per_proc_batch_size,
            cfg_scale=self._cfg_scale,
            sampler=settings.sampler,
            eta=settings.eta,
            global_seed=settings.global_seed,
            vae=settings.vae,
            threads=settings.threads,
            **SAMPLING_ARITHMETIC,
            decode_batch_size=settings.decode_batch_size)
        return [*source, *rest]

    def float_identity(self) -> list[str]:
        return [] if self.settings.ckpt is None else [file_identity(self.settings.ckpt)]

    def judging_identity(self) -> list[str]:
        return [
            file_identity(self._judge.reference_path),
            self._judge.features,
            self.settings.pr_dtype,
            str(self.settings.num_fidelity_samples),
        ]

    def judge(
        self, job: Job, quantised: QuantizedFile | None, images: Path, float_images: Path,
    ) -> Row:
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

    def read_row(self, note: dict[str, Any]) -> Row | None:
        return Row.from_note(note)

    def _model_arguments(self) -> list[str]:
        return flags(
            model=self.settings.model,
            image_size=self._image_size,
            num_sampling_steps=self._steps,
            ckpt=self.settings.ckpt)

    def _float_sizes(self) -> tuple[int, int]:
        """Count the bytes of the float weights, and what Q-DiT counts of them at float16."""
        model = load_float(self.settings, self._image_size, default_device())
        return sum(4 * parameter.numel() for parameter in model.parameters()), float_bytes(model)


def class_conditionals(settings: CompareSettings) -> list[ClassConditional]:
    """List what is compared: every image size, number of steps and guidance."""
    subjects = []
    for image_size, reference in zip(settings.image_sizes, settings.references):
        for steps in settings.steps:
            for cfg_scale in settings.cfg_scales:
                subjects.append(
                    ClassConditional(settings, image_size, steps, cfg_scale, reference))
    return subjects


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
        jobs += [parse_job(recipe, bits) for recipe in recipes]
    for job in jobs:
        check_job(job, steps, card.num_classes)
    return jobs
