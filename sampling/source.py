"""What is sampled, and what its manifest says."""
from pathlib import Path

import torch
from torch import nn

from architectures.registry import architecture_of
from cli.memory import large_blocks_apart
from cli.settings import SampleSettings
from download import Decoder, load_model
from files.digests import sha256, weights_sha256
from quant import checkpoint
from quant.backend import faster
from quant.layers.quantised import QuantizedLayer
from sampling import manifest
from sampling.processes import Processes

TIMED_TOKENS = 4096  # at most, so that choosing a backend takes seconds


def folder_of(settings: SampleSettings) -> Path:
    """Name the folder of the images; more of them, or from more processes, go to the same one."""
    if settings.path is None:
        name = f"{settings.model.name.replace('/', '-')}-{settings.model.image_size}-float"
    else:
        name = settings.path.stem
    return settings.sample_dir / (f"{name}-cfg-{settings.cfg_scale:g}-{settings.sampler}-"
                                  f"{settings.steps}-seed-{settings.seed}")


def load_source(
    settings: SampleSettings,
    folder: Path,  # of images that were made before; ``auto`` goes on with their backend
    run: Processes,
) -> tuple[nn.Module, manifest.Settings]:
    """Load the model, and say what it is: the digest of its weights and what it computes in."""
    load = load_float if settings.path is None else load_checkpoint
    model, digest, backend = load(settings, folder, run)
    if settings.compile:
        compile_blocks(model)
    computed = {
        "weights_sha256": digest,
        "backend": backend,
        "dtype": settings.dtype,
        "compile": settings.compile,
    }
    return model, computed


def load_checkpoint(
    settings: SampleSettings, folder: Path, run: Processes,
) -> tuple[nn.Module, str, str]:
    """Build the quantised model; returns it, its file's SHA-256 and its backend."""
    with large_blocks_apart():
        stored = checkpoint.read(settings.path)
    backend = run.ranks.share(
        "backend", lambda: choose_backend(settings, stored, folder, run.device))
    dtype = getattr(torch, settings.dtype)
    with large_blocks_apart():
        model = checkpoint.build(
            stored, run.device, settings.fold, backend, dtype, settings.packed)
    return model, sha256(settings.path), backend


def load_float(
    settings: SampleSettings, folder: Path, run: Processes,
) -> tuple[nn.Module, str, str]:
    """Load the float model; returns it, its weights' SHA-256 and ``float``."""
    choice = settings.model
    with large_blocks_apart():
        model = load_model(choice.name, choice.card, choice.image_size, choice.num_classes,
                           choice.weights, run.device)
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
        before = backend_before(settings, folder)
        if before is not None:
            return before
        dtype = getattr(torch, settings.dtype)
        tokens = timed_tokens(settings, stored.model)
        return faster(first_block(stored), tokens, dtype, device, settings.packed)
    return checkpoint.backend_for(stored.header, settings.backend, device, measure)


def backend_before(settings: SampleSettings, folder: Path) -> str | None:
    """Read the backend of the images that are there; None if there are none, or they go."""
    if settings.overwrite or not (folder / manifest.NAME).exists():
        return None
    before = manifest.read(folder).get("backend")
    return before if before in ("fake", "integer") else None


def timed_tokens(settings: SampleSettings, model: nn.Module) -> int:
    """Count the tokens of a batch, both halves of guidance included, up to ``TIMED_TOKENS``."""
    halves = 2 if settings.cfg_scale > 1 else 1
    return min(halves * settings.batch * tokens_per_image(model), TIMED_TOKENS)


def manifest_settings(
    settings: SampleSettings, computed: manifest.Settings, decoder: Decoder, run: Processes,
) -> manifest.Settings:
    """List every setting that can change a pixel; ``computed`` is what ``load_source`` said."""
    listed = {
        "model": settings.model.name,
        "image_size": settings.model.image_size,
        "num_classes": settings.model.num_classes,
        "steps": settings.steps,
        **computed,
        "cfg_scale": settings.cfg_scale,
        "sampler": settings.sampler,
        "eta": settings.eta,
        "seed": settings.seed,
        "class_labels": settings.class_labels,
        "decoder": decoder.name,
        "batch": settings.batch,
        "decode_batch": settings.decode_batch,
        "threads": settings.threads,
        "device": run.device.type,
        "tf32": settings.tf32 and run.device.type == "cuda",
        "torch": torch.__version__,
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


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer blocks, which share one compilation."""
    for name in architecture_of(model).blocks(model):
        model.get_submodule(name).compile()
