"""What DiT-Emoji is trained on, and its loss."""
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion import Schedule
from diffusion.loss import training_loss
from examples.emoji.autoencoder import encode
from examples.emoji.data import class_labels, drawn_emoji, to_tensor

SNR_CLAMP = 5.0


def training_latents(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Encode the emoji that DiT-Emoji draws, and their mirror images.

    Returns:
        Scaled latents (918, 4, 16, 16) and labels (918,) int64.
    """
    emoji = drawn_emoji()
    images = to_tensor(emoji.images)
    both = torch.cat([images, images.flip(3)])
    labels = class_labels(emoji)
    return vae.config.scaling_factor * encode(vae, both), torch.cat([labels, labels])


def image_weights(labels: Tensor) -> Tensor:
    """Weigh images (N,) so that a class is drawn as often as the root of its size.

    Of some classes there are three emoji, of one there are 66.
    """
    return labels.bincount()[labels].float().rsqrt()


def snr_weights(schedule: Schedule) -> Tensor:
    """Compute min(SNR, 5) / SNR for every timestep, (steps,) float32 (Hang et al., 2023)."""
    alphas = torch.from_numpy(schedule.alphas_cumprod)
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=SNR_CLAMP) / snr).float()


def weighted_loss(model: nn.Module, schedule: Schedule, latents: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss of latents (N, 4, 16, 16) at random timesteps, a scalar.

    In bfloat16. PyTorch's fused attention is slow there on a CPU, so that it is composed.
    """
    t = torch.randint(len(schedule), (len(latents),))
    noise = torch.randn_like(latents)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        losses = training_loss(model, schedule, latents, t, labels, noise)
    return (snr_weights(schedule)[t] * losses.float()).mean()
