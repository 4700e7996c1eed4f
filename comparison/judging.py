"""What is measured of a row's images: ADM's five numbers, and the distance from the float model."""
import os
import sys
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from cli.values import user_value
from comparison.settings import CompareSettings
from diffusion.generate import Sampling, labels_for
from download import load_decoder, load_model
from errors import UserError
from evaluation.features import ImageSet, load_set
from evaluation.fidelity import (
    Fidelity,
    Perceptual,
    Run,
    compare_runs,
    sample_run,
    seconds_to_sample,
)
from evaluation.networks import load_extractor, load_lpips
from evaluation.scores import Scores, score
from quant import checkpoint

LPIPS_SIZE = 64    # pixels per side that its network needs
TIMED_IMAGES = 16  # at most, in the batch whose sampling is timed


def default_device() -> torch.device:
    """Choose where samples are judged: on a GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_float(settings: CompareSettings, image_size: int, device: torch.device) -> nn.Module:
    """Load the float model that all rows are compared with."""
    card = settings.card
    return load_model(
        settings.model, card, image_size, card.num_classes, settings.ckpt, device)


def find_lpips(image_size: int, device: torch.device) -> Perceptual | None:
    """Load LPIPS; None where images are too small for it or its weights cannot be had."""
    if image_size < LPIPS_SIZE:
        return None
    try:
        return load_lpips(device)
    except UserError as error:
        print(f"LPIPS is n/a: {error}", file=sys.stderr)
        return None


class ImageJudge:
    """Judges images of one size, sampled in one way.

    Attributes:
        features: the name of the network that looks at the images.
        reference_path: the file of real images.
    """

    def __init__(
        self,
        settings: CompareSettings,
        image_size: int,
        sampling: Sampling,
        reference_path: Path,
        device: torch.device,
    ):
        self.reference_path = reference_path
        self._settings = settings
        self._image_size = image_size
        self._sampling = sampling
        self._device = device
        self._extractor = load_extractor(settings.card.features, settings.inception, device)
        self._perceptual = find_lpips(image_size, device)

    @property
    def features(self) -> str:
        return self._extractor.name

    @cached_property
    def reference(self) -> ImageSet:
        """The real images, as the network sees them."""
        # Features are kept beside the file, where that is allowed.
        can_cache = os.access(self.reference_path.parent, os.W_OK)
        load = partial(load_set, cache=can_cache)
        return user_value(load, self.reference_path, self._extractor)

    def check_reference(self) -> None:
        """Check that the real images can be read, and are of the size of the samples.

        Raises:
            UserError: they cannot, or are not.
        """
        size, side = self.reference.size, self._image_size
        if size is not None and size != (side, side):
            raise UserError(
                f"images of '{self.reference_path}' are {size[0]}x{size[1]}, "
                f"expected {side}x{side}: give another --reference")

    def scores(self, npz: Path) -> Scores:
        """Compute ADM's five numbers of a file of samples."""
        samples = user_value(load_set, npz, self._extractor)
        half = self._settings.pr_dtype == "float16"
        return user_value(score, self.reference, samples, half, self._device)

    def fidelity(self, path: Path) -> Fidelity:
        """Compare a checkpoint with the float model, on the first images of the sample."""
        _, quantised = checkpoint.load(path, self._device, folded=True)
        return compare_runs(self._float_run, self._sample(quantised), self._perceptual)

    @cached_property
    def _float_run(self) -> Run:
        return self._sample(load_float(self._settings, self._image_size, self._device))

    def seconds_per_image(self, path: Path | None) -> float:
        """Time the sampling of a batch, decoding left out; the float model where path is None.

        Quantised models run on integers, where checkpoint and machine allow it.
        """
        if path is None:
            model = load_float(self._settings, self._image_size, self._device)
        else:
            stored = checkpoint.read(path)
            backend = checkpoint.backend_for(
                stored.header, "auto", self._device, lambda: "integer")
            model = checkpoint.build(stored, self._device, folded=True, backend=backend)
        settings = self._settings
        batch = min(TIMED_IMAGES, settings.per_proc_batch_size, settings.num_fid_samples)
        return seconds_to_sample(model, self._sampling, batch) / batch

    def _sample(self, model: nn.Module) -> Run:
        """Sample the images that are compared."""
        settings = self._settings
        indices = range(settings.num_fidelity_samples)
        labels = labels_for(indices, self._sampling.seed, model.num_classes, None).tolist()
        decoder = load_decoder(settings.card, settings.vae, self._device)
        batch = settings.decode_batch_size or settings.per_proc_batch_size
        return sample_run(model, decoder, self._sampling, labels, batch)
