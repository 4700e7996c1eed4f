"""DiT-Digits and its twin with outliers, as a family of bundled models."""
import torch
from torch import nn

from diffusion.decoding import Decoder
from examples.bundles import Bundle, Videos
from examples.digits.data import decode, write_reference
from examples.digits.outliers import bundled_weights
from examples.digits.videos import digits_video_extractor, sample_videos, write_video_reference


def load_digits_decoder(device: torch.device) -> Decoder:
    """Return the pixel shuffle that makes images of latents, on any device."""
    return Decoder("digits", decode)


def pipeline_decoder() -> nn.Module:
    """Make the same as a part of a pipeline."""
    # It loads diffusers.
    from ditas.dit import DitasPatchDecoder
    return DitasPatchDecoder(out_channels=1, patch_size=2)


BUNDLE = Bundle(
    folder="examples/digits",
    weights=bundled_weights,
    decoder=load_digits_decoder,
    pipeline_decoder=pipeline_decoder,
    write_reference=write_reference,
    videos=Videos(digits_video_extractor, write_video_reference, sample_videos),
)
