"""The VAE of the emoji models: diffusers' ``AutoencoderKL``, 64 x 64 x 3 to 16 x 16 x 4."""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from errors import UserError
from examples.emoji.data import IMAGE_SIZE, load_emoji, load_tones, to_tensor

# A part of PixArt-Emoji's pipeline; DiT-Emoji has the same.
FOLDER = Path(__file__).parent / "pixart" / "vae"
LATENT_CHANNELS = 4
CHANNELS = (32, 64, 96)  # of the network, from images to latents
HELD_OUT = 40           # every 40th emoji is kept from training, with its skin tones
# Nats per latent against squared error per pixel. At 1e-4 the posterior had as much noise as the
# weakest direction of the latents had signal, and green was lost.
KL_WEIGHT = 1e-6
ABSOLUTE_WEIGHT = 0.1   # of the absolute error, which keeps flat colours flat
SHIFT = 4               # pixels that images are moved by, at most


def build_autoencoder() -> nn.Module:
    """Make the network with random weights (1.6 M parameters)."""
    from diffusers.models import AutoencoderKL
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def split_images() -> tuple[NDArray, NDArray]:
    """Load training and held-out images, uint8 (N, 64, 64, 3).

    Of the held-out emoji no skin tone is trained on. Their relatives ("man", "woman") may be.

    Raises:
        UserError: the skin tones are not there, see ``data.load_tones``.
    """
    emoji = load_emoji()
    tones, base = load_tones()
    kept_out = np.arange(len(emoji)) % HELD_OUT == HELD_OUT // 2
    training = np.concatenate([emoji.images[~kept_out], tones[~kept_out[base]]])
    return training, emoji.images[kept_out]


def recolour(images: Tensor) -> Tensor:
    """Exchange red, green and blue at random in half of the images (N, 3, H, W).

    Most emoji are yellow and red: without it the latents forget green.
    """
    orders = [torch.randperm(3) if torch.rand(()) < 0.5 else torch.arange(3) for _ in images]
    return torch.stack([image[order] for image, order in zip(images, orders)])


def augment(images: Tensor) -> Tensor:
    """Flip half of the images (N, 3, H, W) and move each by up to ``SHIFT`` pixels over white."""
    count, _, height, width = images.shape
    flipped = torch.where((torch.rand(count) < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    padded = F.pad(flipped, (SHIFT,) * 4, value=1.0)
    corners = torch.randint(0, 2 * SHIFT + 1, (count, 2)).tolist()
    moved = [
        image[:, top:top + height, left:left + width]
        for image, (top, left) in zip(padded, corners)
    ]
    return torch.stack(moved)


def autoencoder_loss(vae: nn.Module, images: Tensor) -> Tensor:
    """Compute squared and absolute error plus the KL divergence of the latents, a scalar.

    In bfloat16, which halves the time where processors have it.
    """
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - images
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return error.square().mean() + ABSOLUTE_WEIGHT * error.abs().mean() + KL_WEIGHT * kl


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """Encode images (N, 3, 64, 64) to the means of their latents (N, 4, 16, 16), unscaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(batch)])


@torch.no_grad()
def mean_variance(vae: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """Average the posterior's variance of each latent channel over images and cells, (4,)."""
    parts = [vae.encode(part).latent_dist.var for part in images.split(batch)]
    return torch.cat(parts).mean(dim=(0, 2, 3))


@torch.inference_mode()
def reconstruction_psnr(vae: nn.Module, images: Tensor) -> float:
    """Compute the mean PSNR in dB of images (N, 3, 64, 64) that went through the VAE."""
    decoded = vae.decode(encode(vae, images)).sample.clamp(-1, 1)
    # Values span 2, from -1 to 1.
    errors = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * errors.log10()).mean())


@torch.no_grad()
def whiten_latents(vae: nn.Module, latents: Tensor, variance: Tensor) -> None:
    """Make the latent channels uncorrelated, of mean zero and one deviation, in place.

    Images stay as they are: the encoder's last and the decoder's first 1x1 convolution take up the
    change. Unwhitened, two of the channels are nearly the same, and their difference, which holds
    colour, drowns in noise that is as large in every direction.

    Args:
        latents: (N, 4, H, W), means of what the encoder gives for the training images.
        variance: (4,) of the posterior. Afterwards it is the same for every image: what a mixture
            of channels would have is not linear in the encoder's log variances.
    """
    flat = latents.transpose(0, 1).flatten(1).double()  # (4, N H W)
    mean, deviation = flat.mean(1), flat.std()
    values, vectors = torch.linalg.eigh(flat.cov())
    whiten = deviation * vectors @ torch.diag(values.rsqrt()) @ vectors.T
    unwhiten = torch.linalg.inv(whiten)

    # What leaves the encoder: means, then log variances.
    out, means = vae.quant_conv, slice(0, LATENT_CHANNELS)
    weight, bias = out.weight[means, :, 0, 0].double(), out.bias[means].double()
    out.weight[means, :, 0, 0] = (whiten @ weight).float()
    out.bias[means] = (whiten @ (bias - mean)).float()
    out.weight[LATENT_CHANNELS:] = 0
    out.bias[LATENT_CHANNELS:] = (whiten.square() @ variance.double()).log().float()

    # What enters the decoder: z becomes unwhiten z + mean.
    into = vae.post_quant_conv
    weight = into.weight[:, :, 0, 0].double()
    into.bias += (weight @ mean).float()
    into.weight[:, :, 0, 0] = (weight @ unwhiten).float()
    vae.register_to_config(scaling_factor=round(1 / deviation.item(), 5))


def load_autoencoder(folder: Path = FOLDER) -> nn.Module:
    """Load the VAE in eval mode and float32 (stored as float16).

    Raises:
        UserError: the folder is missing or damaged.
    """
    from diffusers.models import AutoencoderKL
    try:
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    # The loader raises types of several libraries.
    except Exception as error:
        raise UserError(
            f"cannot load the VAE from '{folder}' ({type(error).__name__}): expected config.json "
            "and diffusion_pytorch_model.safetensors; train it, as docs/emoji.md says") from None
    return vae.float().eval()


def training_tensors() -> tuple[Tensor, Tensor]:
    """Load training and held-out images as (N, 3, 64, 64) in [-1, 1]."""
    training, held_out = split_images()
    return to_tensor(training), to_tensor(held_out)
