"""Sample or assemble: what the checked command line of sample_merge_TAS.py asks for."""
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from cli.settings import SampleSettings
from cli.stages import stage
from diffusion import ddim_step, ddpm_step, make_schedule
from diffusion.generate import batch_indices, decode_images, generate_latents, labels_for
from diffusion.sampler import Step
from download import Decoder, load_decoder
from errors import UserError
from files.atomic import writable_folder
from sampling import manifest
from sampling.folder import ImageFolder
from sampling.job import SamplingJob, sample_all
from sampling.processes import Processes
from sampling.source import load_source, manifest_settings


def assemble(folder: Path, settings: SampleSettings, run: Processes) -> None:
    """Write the ``.npz`` of the images that are there.

    Needs no model, and no machine like those that made the images.

    Raises:
        UserError: the folder has no manifest of ours, or an image is missing.
    """
    stored = manifest.read(folder)
    if not {"batch", "image_size"} <= stored.keys():
        raise UserError(f"'{folder / manifest.NAME}' is not a manifest of ours: "
                        "give the --path and --sample-dir that the shards had")
    sample_all(make_job(folder, stored, settings), None, run.ranks, run.stopped)


def sample(folder: Path, settings: SampleSettings, run: Processes) -> None:
    """Make the images that are missing, then the ``.npz``.

    Raises:
        UserError: weights are missing or damaged, or the folder holds other images.
    """
    with stage("load", quiet=not run.is_first):
        model, computed = load_source(settings, folder, run)
        decoder = load_decoder(settings.model.card, settings.model.vae, run.device)
    writable_folder(folder)
    fixed = manifest_settings(settings, computed, decoder, run)
    make = batch_maker(settings, model, decoder)
    with stage("sample", quiet=not run.is_first):
        sample_all(make_job(folder, fixed, settings), make, run.ranks, run.stopped)


def make_job(folder: Path, fixed: manifest.Settings, settings: SampleSettings) -> SamplingJob:
    """Say what is to be made, with the settings that fix every pixel."""
    return SamplingJob(
        folder=ImageFolder(folder, manifest.fingerprint(fixed), fixed["image_size"]),
        settings=fixed,
        wanted=settings.images,
        batch=fixed["batch"],
        shard=settings.shard,
        overwrite=settings.overwrite,
        assemble=settings.assemble,
        log_file=settings.log_file,
    )


def batch_maker(
    settings: SampleSettings, model: nn.Module, decoder: Decoder,
) -> Callable[[int], np.ndarray]:
    """Return a function of a batch's number that makes its images, uint8 (N, H, W, 3)."""
    schedule = make_schedule(settings.steps)
    step = step_of(settings)

    def make(batch: int) -> np.ndarray:
        indices = batch_indices(batch, settings.batch)
        labels = labels_for(indices, settings.seed, model.num_classes, settings.listed)
        latents = generate_latents(
            model, schedule, indices, labels, settings.seed, settings.cfg_scale, step)
        return decode_images(decoder, latents, settings.decode_batch)
    return make


def step_of(settings: SampleSettings) -> Step:
    """Choose the sampler's step."""
    return partial(ddim_step, eta=settings.eta) if settings.sampler == "ddim" else ddpm_step
