"""DDPM (Ho et al., 2020) and DDIM (Song et al., 2021) steps, and the loop around them."""
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x (N, C, H, W), t (N,)) -> (N, 2C, H, W)
Step = Callable[[Schedule, int, Tensor, Tensor, Callable[[], Tensor]], Tensor]


def predict_x0(schedule: Schedule, i: int, x: Tensor, noise: Tensor) -> Tensor:
    """x_0 from x_t and the predicted noise (Ho et al., eq. 15)."""
    a = schedule.alphas_cumprod[i]
    return (1.0 / a) ** 0.5 * x - (1.0 / a - 1.0) ** 0.5 * noise


def learned_log_variance(schedule: Schedule, i: int, v: Tensor) -> Tensor:
    """Interpolation in the log domain between posterior variance and beta; ``v`` in [-1, 1] (Nichol & Dhariwal, eq. 15)."""
    fraction = (v + 1) / 2
    return fraction * float(torch.tensor(schedule.betas[i]).log()) + (1 - fraction) * schedule.posterior_log_variance_clipped[i]


def ddpm_step(schedule: Schedule, i: int, x: Tensor, out: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """One ancestral step from ``x`` (N, C, H, W) at index ``i``; ``out`` (N, 2C, H, W) is the model's output there.

    ``draw`` is called once, except at index 0, which adds no noise.
    """
    noise, v = out.chunk(2, dim=1)
    x0 = predict_x0(schedule, i, x, noise)
    mean = schedule.posterior_mean_coef1[i] * x0 + schedule.posterior_mean_coef2[i] * x
    if i == 0:
        return mean
    return mean + torch.exp(0.5 * learned_log_variance(schedule, i, v)) * draw()


def ddim_step(schedule: Schedule, i: int, x: Tensor, out: Tensor, draw: Callable[[], Tensor], eta: float = 0.0) -> Tensor:
    """One DDIM step (Song et al., eq. 12); ``eta`` 0 is deterministic and draws nothing, 1 has the DDPM posterior variance."""
    noise, _ = out.chunk(2, dim=1)
    x0 = predict_x0(schedule, i, x, noise)
    a, prev = schedule.alphas_cumprod[i], schedule.alphas_cumprod_prev[i]
    sigma = eta * ((1 - prev) / (1 - a)) ** 0.5 * (1 - a / prev) ** 0.5
    mean = prev ** 0.5 * x0 + (1 - prev - sigma ** 2) ** 0.5 * noise
    if i == 0 or eta == 0:
        return mean
    return mean + sigma * draw()


def guided_denoiser(model, labels: Tensor, cfg_scale: float) -> Denoiser:
    """The model with its labels and classifier-free guidance bound; scale 1 runs the labelled half alone."""
    if cfg_scale == 1.0:
        return lambda x, t: model(x, t, labels)
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    return lambda x, t: model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), both, cfg_scale)[: len(x)]


def sample_loop(denoise: Denoiser, schedule: Schedule, x: Tensor, draw: Callable[[], Tensor],
                step: Step = ddpm_step) -> Iterator[Tensor]:
    """Yield the latents (N, C, H, W) after each of the ``len(schedule)`` steps, noisiest first.

    Args:
        x: pure noise to start from.
        draw: returns a fresh standard normal (N, C, H, W) tensor on ``x``'s device.
        step: ``ddpm_step`` or ``ddim_step`` (bind ``eta`` with ``functools.partial``).
    """
    for i in reversed(range(len(schedule))):
        t = torch.full((len(x),), int(schedule.timestep_map[i]), device=x.device)
        x = step(schedule, i, x, denoise(x, t), draw)
        yield x


def sample(denoise: Denoiser, schedule: Schedule, x: Tensor, draw: Callable[[], Tensor], step: Step = ddpm_step) -> Tensor:
    """The final latents of ``sample_loop``."""
    for x in sample_loop(denoise, schedule, x, draw, step):
        pass
    return x
