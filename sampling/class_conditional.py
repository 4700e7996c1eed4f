"""A model of this repository as a source of images: float, or a quantised checkpoint."""
from pathlib import Path

import numpy as np
import torch
from torch import nn

from architectures.registry import architecture_of
from cli.memory import large_blocks_apart
from cli.sample_settings import SampleSettings
from diffusion import make_schedule
from diffusion.decoding import Decoder
from diffusion.generate import (
    Sampling,
    batch_indices,
    decode_images,
    generate_latents,
    labels_for,
)
from download import load_decoder, load_model
from files.digests import sha256, weights_sha256
from quant import checkpoint
from quant.backend import faster
from quant.layers.quantised import QuantizedLayer
from sampling import manifest
from sampling.job import Make
from sampling.processes import Processes
from sampling.source import Images, backend_before, common_settings, compile_blocks

TIMED_TOKENS = 4096  # at most, so that choosing a backend takes seconds


class ClassConditional:
    """Images of classes, from a model of this repository."""

    def __init__(self, settings: SampleSettings):
        self.run = settings.run
        self.folder = folder_of(settings)
        self._settings = settings

    def load(self, processes: Processes) -> Images:
        settings = self._settings
        model, computed = load_computing(settings, self.folder, processes)
        choice = settings.model
        decoder = load_decoder(choice.card, choice.vae, processes.device)
        fixed = manifest_settings(settings, computed, decoder, processes)
        return Images(fixed, batch_maker(settings, model, decoder))


def folder_of(settings: SampleSettings) -> Path:
    """Name the folder of the images; more of them, or from more processes, go to the same one."""
    if settings.path is None:
        name = f"{settings.model.name.replace('/', '-')}-{settings.model.image_size}-float"
    else:
        name = settings.path.stem
    return settings.run.sample_dir / (f"{name}-cfg-{settings.cfg_scale:g}-{settings.sampler}-"
                                  f"{settings.steps}-seed-{settings.run.seed}")


def load_computing(
    settings: SampleSettings,
    folder: Path,  # of images that were made before; ``auto`` goes on with their backend
    processes: Processes,
) -> tuple[nn.Module, manifest.Settings]:
    """Load the model, and say what it is: the digest of its weights and what it computes in."""
    load = load_float if settings.path is None else load_checkpoint
    model, digest, backend = load(settings, folder, processes)
    if settings.run.compile:
        compile_blocks(model, architecture_of(model).blocks(model))
    computed = {
        "weights_sha256": digest,
        "backend": backend,
        "dtype": settings.dtype,
    }
    return model, computed


def load_checkpoint(
    settings: SampleSettings, folder: Path, processes: Processes,
) -> tuple[nn.Module, str, str]:
    """Build the quantised model; returns it, its file's SHA-256 and its backend."""
    with large_blocks_apart():
        stored = checkpoint.read(settings.path)
    backend = processes.ranks.share(
        "backend", lambda: choose_backend(settings, stored, folder, processes.device))
    dtype = getattr(torch, settings.dtype)
    with large_blocks_apart():
        model = checkpoint.build(
            stored, processes.device, settings.fold, backend, dtype, settings.packed)
    return model, sha256(settings.path), backend


def load_float(
    settings: SampleSettings, folder: Path, processes: Processes,
) -> tuple[nn.Module, str, str]:
    """Load the float model; returns it, its weights' SHA-256 and ``float``."""
    choice = settings.model
    with large_blocks_apart():
        model = load_model(choice.name, choice.card, choice.image_size, choice.num_classes,
                           choice.weights, processes.device)
    digest = weights_sha256(model)
    return model.to(getattr(torch, settings.dtype)), digest, "float"


def choose_backend(
    settings: SampleSettings, stored: checkpoint.Stored, folder: Path, device: torch.device,
) -> str:
    """Choose ``fake`` or ``integer``.

    ``auto`` goes on with that of the images in the folder. Where there are none it times the
    first block's linears.
    """
    def measure() -> str:
        before = backend_before(settings.run, folder)
        if before is not None:
            return before
        dtype = getattr(torch, settings.dtype)
        tokens = timed_tokens(settings, stored.model)
        return faster(first_block(stored), tokens, dtype, device, settings.packed)
    return checkpoint.backend_for(stored.header, settings.run.backend, device, measure)


def timed_tokens(settings: SampleSettings, model: nn.Module) -> int:
    """Count the tokens of a batch, both halves of guidance included, up to ``TIMED_TOKENS``."""
    halves = 2 if settings.cfg_scale > 1 else 1
    return min(halves * settings.run.batch * tokens_per_image(model), TIMED_TOKENS)


def manifest_settings(
    settings: SampleSettings, computed: manifest.Settings, decoder: Decoder, processes: Processes,
) -> manifest.Settings:
    """List every setting that can change a pixel; ``computed`` is what ``load_computing`` said."""
    listed = {
        **common_settings(settings.run, processes),
        **computed,
        "model": settings.model.name,
        "image_size": settings.model.image_size,
        "num_classes": settings.model.num_classes,
        "steps": settings.steps,
        "cfg_scale": settings.cfg_scale,
        "sampler": settings.sampler,
        "eta": settings.eta,
        "class_labels": settings.class_labels,
        "decoder": decoder.name,
        "decode_batch": settings.decode_batch,
    }
    if settings.path is not None:
        listed["fold"] = settings.fold
    return listed


def first_block(stored: checkpoint.Stored) -> list[QuantizedLayer]:
    """Take the quantised linears of the first block, modulation aside."""
    architecture = architecture_of(stored.model)
    first = architecture.blocks(stored.model)[0]
    sites = architecture.sites(stored.model, "blocks")
    return [stored.layers[name] for site in sites if site.block == first for name in site.linears]


def tokens_per_image(model: nn.Module) -> int:
    """Count the tokens that an image becomes."""
    return (model.input_size // model.patch_size) ** 2


def batch_maker(
    settings: SampleSettings, model: nn.Module, decoder: Decoder,
) -> Make:
    """Return a function of a batch's number that makes its images, uint8 (N, H, W, 3)."""
    sampling = Sampling(
        make_schedule(settings.steps), settings.run.seed, settings.cfg_scale, settings.sampler,
        settings.eta)

    def make(batch: int) -> np.ndarray:
        indices = batch_indices(batch, settings.run.batch)
        labels = labels_for(indices, sampling.seed, model.num_classes, settings.listed)
        latents = generate_latents(
            model, sampling.schedule, indices, labels, sampling.seed, sampling.cfg_scale,
            sampling.step)
        return decode_images(decoder, latents, settings.decode_batch)
    return make
