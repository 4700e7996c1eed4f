"""DiT-Emoji and its twin with outliers, as a family of bundled models."""
import torch

from diffusion.decoding import Decoder, vae_decoder
from examples.bundles import Bundle
from examples.emoji.autoencoder import load_autoencoder
from examples.emoji.data import write_reference
from examples.emoji.outliers import bundled_weights


def load_emoji_decoder(device: torch.device) -> Decoder:
    """Load the bundled VAE as a decoder of the models' latents."""
    vae = load_autoencoder().to(device)
    return vae_decoder("emoji", vae, vae.config.scaling_factor)


BUNDLE = Bundle(
    folder="examples/emoji",
    weights=bundled_weights,
    decoder=load_emoji_decoder,
    pipeline_decoder=load_autoencoder,
    write_reference=write_reference,
)
