"""What makes images by their number: the seam between a long run and what it samples."""
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from cli.sample_settings import RunSettings
from sampling import manifest
from sampling.folder import ImageFolder
from sampling.job import Make, SamplingJob
from sampling.processes import Processes


@dataclass(frozen=True)
class Images:
    """Images that can be made.

    Attributes:
        settings: every setting that can change a pixel. ``image_size`` is None where no setting
            says how large the images are.
        make: a batch's number to its images.
    """

    settings: manifest.Settings
    make: Make


class Source(Protocol):
    """Whatever makes images by their number.

    Attributes:
        run: how many, and where they go.
        folder: of the images; more of them, or from more processes, go to the same one.
    """

    run: RunSettings
    folder: Path

    def load(self, processes: Processes) -> Images:
        """Load what makes the images.

        Raises:
            UserError: weights are missing or damaged.
        """


def make_job(source: Source, settings: manifest.Settings) -> SamplingJob:
    """Say what is to be made, with the settings that fix every pixel."""
    run = source.run
    fingerprint = manifest.fingerprint(settings)
    return SamplingJob(
        folder=ImageFolder(source.folder, fingerprint, settings["image_size"]),
        settings=settings,
        wanted=run.images,
        batch=settings["batch"],
        shard=run.shard,
        overwrite=run.overwrite,
        assemble=run.assemble,
        log_file=run.log_file,
    )


def common_settings(run: RunSettings, processes: Processes) -> manifest.Settings:
    """List the settings that can change a pixel whatever is sampled."""
    on_gpu = processes.device.type == "cuda"
    return {
        "seed": run.seed,
        "batch": run.batch,
        "compile": run.compile,
        "threads": run.threads,
        "device": processes.device.type,
        "tf32": run.tf32 and on_gpu,
        "torch": torch.__version__,
    }


def backend_before(run: RunSettings, folder: Path) -> str | None:
    """Read the backend of the images that are there; None if there are none, or they go."""
    if run.overwrite or not (folder / manifest.NAME).exists():
        return None
    before = manifest.read(folder).get("backend")
    return before if before in ("fake", "integer") else None


def compile_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Compile the blocks of these names; those of one kind share a compilation."""
    for name in names:
        model.get_submodule(name).compile()
