"""What is measured of a pipeline's images: their distance from the float pipeline's, and scores."""
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cli.pipeline_sampling import pipeline_sampling
from cli.pipelines import read_prompts
from cli.sample_flags import make_parser
from cli.values import user_value
from comparison.judging import LPIPS_SIZE, find_lpips
from comparison.pipeline_settings import PipelineTableSettings
from evaluation.clip import load_clip
from evaluation.features import ImageSet, load_set
from evaluation.fidelity import Perceptual, Run, compare_runs
from evaluation.metrics import SSIM_WINDOW, frechet_distance, ssim
from evaluation.networks import load_extractor
from evaluation.scores import check_sizes
from files.npz import read_arrays, read_images
from sampling.pipeline import draw, load_settled

FORMATS = {
    "MB": ".1f", "calibration s": ".0f", "FID to float": ".3f", "FID": ".3f", "CLIP": ".2f",
    "SQNR dB": ".1f", "image SQNR dB": ".1f", "PSNR dB": ".1f", "SSIM": ".4f", "LPIPS": ".4f"}
LIKENESS = ("SQNR dB", "image SQNR dB", "PSNR dB", "SSIM", "LPIPS")
FEATURES = "efficientnet"


class PipelineJudge:
    """Judges the images of one pipeline, float and quantised.

    Attributes:
        columns: what it measures, and the size and seconds before it.
    """

    def __init__(self, settings: PipelineTableSettings, device: torch.device):
        self._settings = settings
        self._device = device
        self._extractor = load_extractor(FEATURES, None, device)
        self._clip = None if settings.clip is None else load_clip(settings.clip, device)
        self._prompts = read_prompts(settings.prompts)
        self._count = min(settings.num_fidelity_samples, settings.num_fid_samples)
        self._float_latents: Tensor | None = None

    @cached_property
    def columns(self) -> tuple[str, ...]:
        optional = {
            "FID": self._settings.reference, "CLIP": self._clip, "LPIPS": self._perceptual}
        return tuple(name for name in FORMATS if optional.get(name, name) is not None)

    def describe(self) -> str:
        """Say what the network and the real images are."""
        reference = self._settings.reference
        of = "" if reference is None else f", reference {reference.name} (N = {self._real.count})"
        return f"features {self._extractor.name}{of}"

    def check_reference(self) -> None:
        """Look at the real images, if there are any.

        Raises:
            UserError: they cannot be read.
        """
        if self._settings.reference is not None:
            _ = self._real

    def scores(self, images: Path, float_images: Path) -> dict[str, float | None]:
        """Compute the Fréchet distances to the float pipeline's and to real images, and CLIP's."""
        samples = user_value(self._load, images)
        values: dict[str, float | None] = {"FID to float": None}
        if images != float_images:
            plain = user_value(self._load, float_images)
            values["FID to float"] = frechet_distance(plain.pool, samples.pool)
        if self._settings.reference is not None:
            user_value(check_sizes, self._real, samples)
            values["FID"] = frechet_distance(self._real.pool, samples.pool)
        if self._clip is not None:
            pixels = pixels_of(images)
            shown = [self._prompts[i % len(self._prompts)] for i in range(len(pixels))]
            values["CLIP"] = self._clip(pixels, shown)
        return values

    def likeness(
        self,
        arguments: list[str] | None,  # of sample_merge_TAS.py; None: it is the float pipeline
        float_arguments: list[str],
        images: Path,
        float_images: Path,
    ) -> dict[str, float | None]:
        """Measure how far the first images are from the float pipeline's, and their latents."""
        names = [name for name in LIKENESS if name in self.columns]
        count = self._count
        if arguments is None or count == 0:
            return dict.fromkeys(names)
        if self._float_latents is None:
            self._float_latents = self._latents(float_arguments)
        plain = Run(self._float_latents[None], pixels_of(float_images)[:count])
        test = Run(self._latents(arguments)[None], pixels_of(images)[:count])
        side = min(test.images.shape[1:3])
        perceptual = self._perceptual if side >= LPIPS_SIZE else None
        measured = compare_runs(plain, test, perceptual)
        values = {
            "SQNR dB": measured.sqnr_db[-1],
            "image SQNR dB": measured.image_sqnr_db,
            "PSNR dB": measured.psnr_db,
            "SSIM": None,
            "LPIPS": measured.lpips,
        }
        if side >= SSIM_WINDOW:
            values["SSIM"] = float(ssim(plain.images, test.images).mean())
        return {name: values[name] for name in names}

    def _latents(self, arguments: list[str]) -> Tensor:
        """Sample the final latents (N, …) of the images that are compared, on the CPU."""
        settings = pipeline_sampling(make_parser("").parse_args(arguments))
        pipeline = load_settled(settings, self._device)
        count, batch = self._count, settings.run.batch
        latents = [draw(settings, pipeline, number, "latent").cpu().float()
                   for number in range(-(-count // batch))]
        return torch.cat(latents)[:count]

    @cached_property
    def _perceptual(self) -> Perceptual | None:
        return find_lpips(LPIPS_SIZE, self._device)

    @cached_property
    def _real(self) -> ImageSet:
        return user_value(self._load, self._settings.reference)

    def _load(self, path: Path) -> ImageSet:
        return load_set(path, self._extractor)


def pixels_of(path: Path) -> NDArray:
    """Read the images of an ``.npz``, uint8 (N, H, W, 3)."""
    return np.asarray(read_images(path, read_arrays(path)))
