"""Training loss: squared noise error, and the variational bound of the learned variance.

Nichol & Dhariwal, 2021.
"""
import math

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.schedule import Schedule


def _at(coefficients: NDArray, t: Tensor) -> Tensor:
    """Pick each image's coefficient, (N, 1, 1, 1) float32 on the device of ``t`` (N,)."""
    picked = torch.as_tensor(coefficients, dtype=torch.float32)[t.cpu()]
    return picked.to(t.device).view(-1, 1, 1, 1)


def gaussian_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """Compute the KL divergence of two normals, elementwise, in nats."""
    return 0.5 * (
        logvar2 - logvar1 - 1.0
        + torch.exp(logvar1 - logvar2)
        + (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    )


def discretised_nll(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Compute the negative log likelihood of 8-bit values under a normal (Ho et al., eq. 13).

    Elementwise and in nats, of values that were mapped to [-1, 1].
    """
    inverse_std = torch.exp(-0.5 * logvar)
    upper = _normal_cdf(inverse_std * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_std * (x - mean - 1 / 255))
    # The outermost levels take the tails as well.
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(v: Tensor) -> Tensor:
    """Approximate the distribution function of the standard normal by a tanh."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v ** 3)))


def training_loss(
    model: nn.Module,
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    y: Tensor,
    noise: Tensor,
) -> Tensor:
    """Compute the loss of each image, (N,): noise MSE plus variational term in bits per dimension.

    The variational term trains the variance only: its mean uses the detached noise prediction.

    Args:
        model: predicts noise and variance, see ``models.DiT``.
        x0: clean latents (N, C, H, W).
        t: indices (N,) into ``schedule``.
        y: labels (N,).
        noise: standard normal, like ``x0``.
    """
    # Diffuse to step t, and predict.
    a = _at(schedule.alphas_cumprod, t)
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    timesteps = torch.as_tensor(schedule.timestep_map)[t.cpu()].to(t.device)
    predicted, v = model(x, timesteps, y).chunk(2, dim=1)

    # The step back to t - 1: its posterior, and what the model makes of it.
    coef1 = _at(schedule.posterior_mean_coef1, t)
    coef2 = _at(schedule.posterior_mean_coef2, t)
    posterior_logvar = _at(schedule.posterior_log_variance_clipped, t)
    fraction = (v + 1) / 2
    logvar = fraction * _at(schedule.betas, t).log() + (1 - fraction) * posterior_logvar
    x0_predicted = (x - (1 - a).sqrt() * predicted.detach()) / a.sqrt()
    mean = coef1 * x0_predicted + coef2 * x

    # Variational bound: KL divergence of the two, but at index 0 the likelihood of x_0.
    kl = gaussian_kl(coef1 * x0 + coef2 * x, posterior_logvar, mean, logvar)
    nll = discretised_nll(x0, mean, logvar)
    bound = torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl).mean(dim=(1, 2, 3))
    mse = ((predicted - noise) ** 2).mean(dim=(1, 2, 3))
    return mse + bound / math.log(2.0)
