"""The folder of a pipeline, as what is compared."""
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cli.call_arguments import call_arguments
from cli.pipelines import COMPONENT, read_prompts
from cli.quantize import QuantizedFile
from comparison.arguments import SAMPLING_ARITHMETIC, flags
from comparison.jobs import FLOAT, OVERRIDES, Job, parse_job
from comparison.judging import default_device
from comparison.kept import file_identity
from comparison.pipeline_judging import FORMATS, PipelineJudge
from comparison.pipeline_settings import PipelineTableSettings
from files.atomic import file_stem
from files.digests import folder_sha256, text_sha256

# A pipeline has no classes.
PIPELINE_OVERRIDES = tuple(name for name in OVERRIDES if name != "class-labels")


@dataclass(frozen=True)
class PipelineRow:
    """A filled row.

    Attributes:
        label: the recipe as it was given.
        bits: weight and activation bits, such as ``4/8``.
        numbers: what was measured, under the names of the columns; None where nothing was.
        npz: the file of samples.
    """

    label: str
    bits: str
    numbers: dict[str, float | None]
    npz: str

    # Of latents the last ones are compared alone.
    fidelity = None

    @property
    def title(self) -> str:
        return f"{self.label} {self.bits}"

    def cells(self) -> list[str]:
        """Format the row under its columns."""
        numbers = [
            "-" if value is None else format(value, FORMATS[name])
            for name, value in self.numbers.items()
        ]
        return [self.label, self.bits, *numbers]

    def as_note(self) -> dict[str, Any]:
        """Convert to what JSON can hold."""
        return asdict(self)


class PipelineSubject:
    """A pipeline at one number of steps and guidance.

    Raises:
        UserError: unknown recipe, flag or bit width, or a file that cannot be had.
    """

    def __init__(
        self, settings: PipelineTableSettings, steps: str | None, guidance: float | None,
    ):
        self.settings = settings
        self._steps = steps
        self._guidance = guidance
        name = Path(settings.model).resolve().name
        arguments = call_arguments(
            settings.folder, settings.pipeline_args, num_inference_steps=steps,
            guidance_scale=guidance)
        # Of what nobody says, the pipeline has a default of its own.
        shown = str(arguments.get("num_inference_steps", "own"))
        scale = str(arguments.get("guidance_scale", "own"))
        self.title = f"{name}, {shown} steps, guidance {scale}"
        self.place = file_stem(f"{name}-{shown}")
        self.name = file_stem(f"{self.place}-{scale}")
        self.note = file_stem(f"row-{scale}.json")
        self.setting = (settings.model, "-", shown, scale)
        self.jobs = [FLOAT, *_jobs(settings)]
        self._judge = PipelineJudge(settings, default_device())

    @property
    def columns(self) -> tuple[str, ...]:
        return ("recipe", "W/A", *self._judge.columns)

    def check_reference(self) -> None:
        self._judge.check_reference()

    def describe(self) -> str:
        settings = self.settings
        prompts = read_prompts(settings.prompts)
        return (
            f"{settings.num_fid_samples} images of {len(prompts)} prompts "
            f"({settings.prompts.name}), seed {settings.global_seed}; calibrated on "
            f"{settings.calibration_prompts.name}; {self._judge.describe()}; SQNR of latents and "
            "likeness of images against the float pipeline with the same noise, "
            f"{settings.num_fidelity_samples} images.")

    def output(self, folder: Path) -> Path:
        return folder / "pipeline"

    def marker_file(self, output: Path) -> Path:
        return output / "model_index.json"

    def digest(self, output: Path) -> str:
        return folder_sha256(output)

    def quantising_arguments(self, job: Job, output: Path) -> list[str]:
        settings = self.settings
        source = flags(
            model=settings.folder,
            num_sampling_steps=self._steps,
            prompts=settings.calibration_prompts,
            pipeline_args=settings.pipeline_args)
        return [*source, *job.arguments, *flags(seed=settings.seed, output=output)]

    def report_arguments(self, folder: Path) -> list[str]:
        # QuantDiT.py draws none of a pipeline.
        return []

    def sampling_arguments(self, output: Path | None) -> list[str]:
        settings = self.settings
        return flags(
            path=settings.folder if output is None else output,
            prompts=settings.prompts,
            num_sampling_steps=self._steps,
            cfg_scale=self._guidance,
            pipeline_args=settings.pipeline_args,
            per_proc_batch_size=settings.per_proc_batch_size,
            global_seed=settings.global_seed,
            threads=settings.threads,
            **SAMPLING_ARITHMETIC)

    def float_identity(self) -> list[str]:
        return [*self._float_files, *self._texts]

    def judging_identity(self) -> list[str]:
        settings = self.settings
        read = [path for path in (settings.reference, settings.clip) if path is not None]
        return [
            *[file_identity(path) for path in read],
            *self.columns,
            str(settings.num_fidelity_samples),
        ]

    def judge(
        self, job: Job, quantised: QuantizedFile | None, images: Path, float_images: Path,
    ) -> PipelineRow:
        folder = self.settings.folder if quantised is None else quantised.path
        numbers = {
            "MB": weight_bytes(folder / COMPONENT) / 1e6,
            "calibration s": None if quantised is None else quantised.seconds,
            **self._judge.scores(images, float_images),
            **self._judge.likeness(
                None if quantised is None else self.sampling_arguments(quantised.path),
                self.sampling_arguments(None), images, float_images),
        }
        return PipelineRow(job.label, job.bits, numbers, str(images))

    def read_row(self, note: dict[str, Any]) -> PipelineRow | None:
        values = {name: value for name, value in note.items() if name != "key"}
        try:
            return PipelineRow(**values)
        except TypeError:
            return None

    @cached_property
    def _float_files(self) -> list[str]:
        return [file_identity(path) for path in _files(self.settings.folder)]

    @cached_property
    def _texts(self) -> list[str]:
        files = (self.settings.prompts, self.settings.calibration_prompts)
        return [text_sha256(json.dumps(read_prompts(path))) for path in files]


def pipelines(settings: PipelineTableSettings) -> list[PipelineSubject]:
    """List what is compared: every number of steps and guidance."""
    return [PipelineSubject(settings, steps, guidance)
            for steps in settings.steps for guidance in settings.guidance]


def _jobs(settings: PipelineTableSettings) -> Iterator[Job]:
    for bits in settings.bits:
        for recipe in settings.recipes:
            yield parse_job(recipe, bits, PIPELINE_OVERRIDES)


def weight_bytes(folder: Path) -> int:
    """Count the bytes of a part's weights on the disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
