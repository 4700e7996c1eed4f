"""DDPM (Ho et al., 2020) and DDIM (Song et al., 2021) steps, and the loop around them.

The steps and the loop know tensors alone. ``guided_denoiser`` binds a class-conditional DiT: its
labels, and index ``num_classes`` as the null label.
"""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from diffusion.schedule import Schedule

Draw = Callable[[], Tensor]  # fresh standard normal noise, like x
Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x (N, C, H, W), t (N,)) -> (N, 2C, H, W)
Step = Callable[[Schedule, int, Tensor, Tensor, Draw], Tensor]  # ddpm_step and ddim_step


def predict_x0(schedule: Schedule, i: int, x: Tensor, noise: Tensor) -> Tensor:
    """Compute x_0 from x_t and the predicted noise (Ho et al., eq. 15)."""
    a = schedule.alphas_cumprod[i]
    return (1.0 / a) ** 0.5 * x - (1.0 / a - 1.0) ** 0.5 * noise


def learned_log_variance(schedule: Schedule, i: int, v: Tensor) -> Tensor:
    """Interpolate log variances, from the posterior's to beta (Nichol & Dhariwal, eq. 15).

    Args:
        v: the model's coefficient, from -1 (posterior) to 1 (beta).
    """
    fraction = (v + 1) / 2
    log_beta = float(torch.tensor(schedule.betas[i]).log())
    return fraction * log_beta + (1 - fraction) * schedule.posterior_log_variance_clipped[i]


def ddpm_step(schedule: Schedule, i: int, x: Tensor, out: Tensor, draw: Draw) -> Tensor:
    """Take one ancestral step.

    Args:
        i: index into ``schedule``.
        x: latents (N, C, H, W) at that index.
        out: what the model gives for them, (N, 2C, H, W).
        draw: called once, except at index 0, which adds no noise.

    Returns:
        Latents (N, C, H, W) at the next lower index.
    """
    noise, v = out.chunk(2, dim=1)
    x0 = predict_x0(schedule, i, x, noise)
    mean = schedule.posterior_mean_coef1[i] * x0 + schedule.posterior_mean_coef2[i] * x
    if i == 0:
        return mean
    std = torch.exp(0.5 * learned_log_variance(schedule, i, v))
    return mean + std * draw()


def ddim_step(
    schedule: Schedule,
    i: int,
    x: Tensor,
    out: Tensor,
    draw: Draw,
    eta: float = 0.0,
) -> Tensor:
    """Take one DDIM step (Song et al., eq. 12); arguments as in ``ddpm_step``.

    Args:
        eta: 0 is deterministic and draws nothing, 1 has the posterior variance of DDPM.
    """
    noise, _ = out.chunk(2, dim=1)
    x0 = predict_x0(schedule, i, x, noise)
    a = schedule.alphas_cumprod[i]
    prev = schedule.alphas_cumprod_prev[i]
    sigma = eta * ((1 - prev) / (1 - a)) ** 0.5 * (1 - a / prev) ** 0.5
    mean = prev ** 0.5 * x0 + (1 - prev - sigma ** 2) ** 0.5 * noise
    if i == 0 or eta == 0:
        return mean
    return mean + sigma * draw()


def guided_denoiser(model: nn.Module, labels: Tensor, cfg_scale: float) -> Denoiser:
    """Bind a model's labels (N,) and its classifier-free guidance.

    Scale 1 runs the labelled half alone; others run every image with its label and without.
    """
    if cfg_scale == 1.0:
        return lambda x, t: model(x, t, labels)

    both = torch.cat([labels, torch.full_like(labels, model.num_classes)])  # (2N,)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        out = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), both, cfg_scale)
        return out[: len(x)]  # (N, 2C, H, W)

    return denoise


def sample_loop(
    denoise: Denoiser,
    schedule: Schedule,
    x: Tensor,
    draw: Draw,
    step: Step = ddpm_step,
) -> Iterator[Tensor]:
    """Yield the latents (N, C, H, W) after each of the ``len(schedule)`` steps, noisiest first.

    Args:
        x: pure noise to start from.
        draw: returns fresh noise on ``x``'s device.
        step: ``ddpm_step`` or ``ddim_step`` (bind ``eta`` with ``functools.partial``).
    """
    for i in reversed(range(len(schedule))):
        t = torch.full((len(x),), int(schedule.timestep_map[i]), device=x.device)
        x = step(schedule, i, x, denoise(x, t), draw)
        yield x
