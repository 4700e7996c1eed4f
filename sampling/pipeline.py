"""A folder of a diffusers pipeline as a source of images: float, or with quantised parts."""
import inspect
import json
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from architectures.discover import find_blocks
from cli.pipeline_sampling import PipelineSampling
from cli.pipelines import COMPONENT, call_pipeline, read_pipeline
from diffusion.generate import batch_indices
from diffusion.noise import image_generators

# Importing from ditas lets diffusers load quantised parts.
from ditas.switching import backend_of, is_quantised, switch_backend
from errors import UserError
from files.atomic import file_stem
from files.digests import folder_sha256, text_sha256
from sampling import manifest
from sampling.job import Make
from sampling.processes import Processes
from sampling.source import Images, backend_before, common_settings, compile_blocks

# Arguments of a call that say how many frames a video has.
FRAMES = {"num_frames", "video_length"}
# Arguments of a call that stand in the name of the images' folder, with what stands before them.
NAMED = {"guidance_scale": "cfg-", "num_inference_steps": "steps-"}


class PipelineSource:
    """Images of prompts, from a pipeline's folder."""

    def __init__(self, settings: PipelineSampling):
        self.run = settings.run
        self._settings = settings
        given = [f"{NAMED[name]}{settings.arguments[name]}"
                 for name in NAMED if name in settings.arguments]
        name = "-".join([settings.path.resolve().name, *given, f"seed-{self.run.seed}"])
        self.folder = self.run.sample_dir / file_stem(name)

    def load(self, processes: Processes) -> Images:
        settings = self._settings
        pipeline = load(settings, processes.device)
        backend = self._agree_on_backend(pipeline, processes)
        if self.run.compile:
            for part in computing_parts(pipeline):
                compile_blocks(part, blocks_of(part))
        fixed = {
            **common_settings(self.run, processes),
            **manifest_settings(settings),
            "backend": backend,
        }
        return Images(fixed, batch_maker(settings, pipeline))

    def _agree_on_backend(self, pipeline, processes: Processes) -> str:
        """Let all processes compute as the first one does, or as the images that are there."""
        quantised = [part for part in computing_parts(pipeline) if is_quantised(part)]
        if not quantised:
            if self.run.backend == "integer":
                raise UserError(f"--backend integer needs a quantised pipeline, and "
                                f"'{self._settings.path}' is a float one: drop it")
            return "float"

        def choose() -> str:
            if self.run.backend != "auto":
                return self.run.backend
            return backend_before(self.run, self.folder) or backend_of(quantised[0])

        backend = processes.ranks.share("backend", choose)
        for part in quantised:
            switch_backend(part, backend)
        return backend_of(quantised[0])


def load(settings: PipelineSampling, device: torch.device):
    """Load the pipeline onto a device.

    Raises:
        UserError: it cannot be loaded, takes no prompts, or makes videos.
    """
    on_gpu = device.type == "cuda"
    dtype = settings.dtype or ("bfloat16" if on_gpu else None)
    how = {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
    if on_gpu:
        # Quantised parts are built where they compute. The process has chosen its GPU.
        how["device_map"] = "cuda"
    pipeline = read_pipeline(settings.path, **how)
    if not FRAMES.isdisjoint(inspect.signature(pipeline.__call__).parameters):
        raise UserError(f"a {settings.kind} makes videos, and PNGs hold images: "
                        "sample it from Python")
    return pipeline


def load_settled(settings: PipelineSampling, device: torch.device):
    """Load the pipeline to compute in the arithmetic that the settings name.

    Raises:
        UserError: it cannot be loaded, takes no prompts, or does not allow the arithmetic.
    """
    pipeline = load(settings, device)
    for part in computing_parts(pipeline):
        if is_quantised(part):
            switch_backend(part, settings.run.backend)
    return pipeline


def computing_parts(pipeline) -> list[nn.Module]:
    """List the transformer, and other parts that are quantised."""
    parts = {name: part for name, part in pipeline.components.items()
             if isinstance(part, nn.Module)}
    return [part for name, part in parts.items() if name == COMPONENT or is_quantised(part)]


def blocks_of(model: nn.Module) -> list[str]:
    """Name the repeated blocks of a part.

    Raises:
        UserError: there are none.
    """
    try:
        return find_blocks(model)
    except ValueError as error:
        raise UserError(f"--compile: {error}") from None


def manifest_settings(settings: PipelineSampling) -> manifest.Settings:
    """List what can change a pixel and is a pipeline's own."""
    return {
        "pipeline": settings.kind,
        "files_sha256": folder_sha256(settings.path),
        "arguments": json.dumps(settings.arguments, sort_keys=True),
        "prompts": len(settings.prompts),
        "prompts_sha256": text_sha256("\n".join(settings.prompts)),
        "dtype": settings.dtype,
        "image_size": None,
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
    }


def batch_maker(settings: PipelineSampling, pipeline) -> Make:
    """Return a function of a batch's number that makes its images, uint8 (N, H, W, 3)."""
    def make(batch: int) -> np.ndarray:
        return as_bytes(draw(settings, pipeline, batch, "np"), settings.run.batch)
    return make


@torch.inference_mode()
def draw(settings: PipelineSampling, pipeline, batch: int, output_type: str):
    """Draw a batch of prompts, each from its own noise; returns what the pipeline gives.

    Args:
        output_type: ``np`` for images in [0, 1], ``latent`` for latents.

    Raises:
        UserError: the pipeline does not take its arguments.
    """
    indices = batch_indices(batch, settings.run.batch)
    prompts = [settings.prompts[index % len(settings.prompts)] for index in indices]
    generators = image_generators(settings.run.seed, indices)
    return call_pipeline(pipeline, prompts, generators, output_type, settings.arguments)[0]


def as_bytes(images: np.ndarray, count: int) -> np.ndarray:
    """Convert a pipeline's images in [0, 1] to uint8 (N, H, W, 3), rounded as diffusers does.

    Raises:
        UserError: they are no colour images, one a prompt.
        ValueError: a value is not finite.
    """
    shape = np.shape(images)
    if len(shape) != 4 or shape[3] != 3:
        raise UserError(f"the pipeline gives arrays of shape {shape}, and PNGs hold images "
                        "(N, H, W, 3): sample videos from Python")
    if len(images) != count:
        raise UserError(f"the pipeline gives {len(images)} images for {count} prompts: "
                        "expected one each")
    if not np.isfinite(images).all():
        raise ValueError("the model produced NaN or infinity")
    return (images * 255).round().astype(np.uint8)
