"""Noise schedule and timestep respacing (Ho et al., 2020; Nichol & Dhariwal, 2021)."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """Coefficients of a respaced diffusion, (steps,) float64 each; index 0 is the least noisy."""

    timestep_map: NDArray                    # int64: original timesteps, which the model gets
    betas: NDArray
    alphas_cumprod: NDArray
    alphas_cumprod_prev: NDArray
    posterior_log_variance_clipped: NDArray  # Ho et al., eq. 7; entry 0, a 0, repeats entry 1
    posterior_mean_coef1: NDArray            # of the predicted x_0, Ho et al., eq. 7
    posterior_mean_coef2: NDArray            # of x_t

    def __len__(self) -> int:
        return len(self.betas)


def space_timesteps(respacing: str, total: int = TRAIN_STEPS) -> list[int]:
    """Choose the original timesteps that a respacing keeps, ascending.

    ``"100"`` spreads 100 steps over the whole range, ends included. ``"10,15,20"`` does so within
    as many equal sections. ``"ddim25"`` takes a constant integer stride from timestep 0 (Song et
    al., 2021).

    Raises:
        ValueError: malformed, more steps than a section holds, or no integer stride fits.
    """
    if respacing.startswith("ddim"):
        wanted = _positive(respacing[len("ddim"):], respacing)
        return _strided_timesteps(wanted, total, respacing)

    counts = [_positive(part, respacing) for part in respacing.split(",")]
    size, extra = divmod(total, len(counts))
    kept = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise ValueError(
                f"cannot take {count} steps from {length} timesteps ('{respacing}'): "
                f"expected 1 to {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        kept += [start + round(k * stride) for k in range(count)]
        start += length
    return kept


def _strided_timesteps(wanted: int, total: int, respacing: str) -> list[int]:
    for stride in range(1, total + 1):
        steps = range(0, total, stride)
        if len(steps) == wanted:
            return list(steps)
    raise ValueError(
        f"no integer stride makes {wanted} of {total} timesteps ('{respacing}'): "
        "try ddim25, ddim50 or ddim100")


def _positive(text: str, respacing: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(
            f"bad number of sampling steps '{respacing}': "
            f"expected 1 to {TRAIN_STEPS}, 'ddimN' or a list like '10,15,20'")
    return int(text)


def make_schedule(respacing: str = str(TRAIN_STEPS)) -> Schedule:
    """Make the linear schedule of 1000 steps (beta 1e-4 to 2e-2), respaced.

    The timesteps that are kept keep their noise levels.

    Raises:
        ValueError: as ``space_timesteps``.
    """
    return schedule_of(space_timesteps(respacing))


def schedule_of(timesteps: Sequence[int]) -> Schedule:
    """Make the linear schedule of 1000 steps that keeps these original timesteps, ascending."""
    timestep_map = np.array(timesteps, dtype=np.int64)

    # Noise levels of the kept timesteps, and the betas that lead from one to the next.
    full = np.cumprod(1.0 - np.linspace(1e-4, 2e-2, TRAIN_STEPS, dtype=np.float64))
    alphas_cumprod = full[timestep_map]
    prev = np.concatenate([[1.0], alphas_cumprod[:-1]])
    betas = 1.0 - alphas_cumprod / prev

    # The posterior of x_{t-1} given x_t and x_0 (Ho et al., eq. 7).
    variance = betas * (1.0 - prev) / (1.0 - alphas_cumprod)
    clipped = np.concatenate([variance[1:2], variance[1:]]) if len(variance) > 1 else betas
    return Schedule(
        timestep_map=timestep_map,
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=prev,
        posterior_log_variance_clipped=np.log(clipped),
        posterior_mean_coef1=betas * np.sqrt(prev) / (1.0 - alphas_cumprod),
        posterior_mean_coef2=(1.0 - prev) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
    )
