"""Training loss: squared noise error plus the variational bound of the learned variance (Nichol & Dhariwal, 2021)."""
import math

import torch
from torch import Tensor

from diffusion.schedule import Schedule


def _at(values, t: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32)[t.cpu()].to(t.device).view(-1, 1, 1, 1)  # (N, 1, 1, 1)


def gaussian_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL divergence of two normals, elementwise, in nats."""
    return 0.5 * (logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def discretised_nll(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Negative log likelihood, elementwise in nats, of 8-bit values mapped to [-1, 1] under a normal (Ho et al., eq. 13)."""
    def cdf(v):
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v ** 3)))
    inverse_std = torch.exp(-0.5 * logvar)
    upper, lower = cdf(inverse_std * (x - mean + 1 / 255)), cdf(inverse_std * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return -mass.clamp(min=1e-12).log()


def training_loss(model, schedule: Schedule, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """Loss of each image, (N,): noise MSE plus variational term in bits per dimension.

    The variational term trains the variance only: its mean uses the detached noise prediction.

    Args:
        x0: clean latents (N, C, H, W); t: (N,) index into ``schedule``; y: (N,) labels; noise: like ``x0``.
    """
    a = _at(schedule.alphas_cumprod, t)
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    timesteps = torch.as_tensor(schedule.timestep_map)[t.cpu()].to(t.device)
    predicted, v = model(x, timesteps, y).chunk(2, dim=1)

    coef1, coef2 = _at(schedule.posterior_mean_coef1, t), _at(schedule.posterior_mean_coef2, t)
    posterior_logvar = _at(schedule.posterior_log_variance_clipped, t)
    fraction = (v + 1) / 2
    logvar = fraction * _at(schedule.betas, t).log() + (1 - fraction) * posterior_logvar
    x0_predicted = (x - (1 - a).sqrt() * predicted.detach()) / a.sqrt()
    mean = coef1 * x0_predicted + coef2 * x
    kl = gaussian_kl(coef1 * x0 + coef2 * x, posterior_logvar, mean, logvar)
    bound = torch.where(t.view(-1, 1, 1, 1) == 0, discretised_nll(x0, mean, logvar), kl).mean(dim=(1, 2, 3))
    return ((predicted - noise) ** 2).mean(dim=(1, 2, 3)) + bound / math.log(2.0)
