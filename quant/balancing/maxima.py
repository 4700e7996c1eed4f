"""Statistics to smoothing factors: TAS (DiTAS, section 4) and SmoothQuant (Xiao et al., 2023, eq. 4)."""
from torch import Tensor


def aggregate(absmax: Tensor, balance: str, timestep: int) -> Tensor:
    """Channel magnitudes ``a`` (I,) from maxima per sampling step (steps, I).

    ``tas`` takes the maximum over all steps; ``smoothquant`` the one step at index ``timestep`` of the sampling order
    (0 is the noisiest; negative counts from the end).
    """
    return absmax.amax(0) if balance == "tas" else absmax[timestep]


def smoothing_factors(act: Tensor, weight: Tensor, alpha: float, floor: float) -> Tensor:
    """``s_j = max(a_j^alpha / w_j^(1 - alpha), floor)``, (I,), with ``a`` and ``w`` themselves at least ``floor``.

    Args:
        act: ``a`` (I,), channel magnitudes of the activation.
        weight: (O, I); ``w_j`` is its largest magnitude in column j.
        alpha: migration strength in [0, 1].
    """
    a = act.clamp(min=floor)
    w = weight.abs().amax(0).clamp(min=floor)
    return (a.pow(alpha) / w.pow(1 - alpha)).clamp(min=floor)


def check_step(timestep: int, steps: int) -> None:
    """Raises:
        ValueError: ``timestep`` is not an index of a trajectory of ``steps`` steps.
    """
    if not -steps <= timestep < steps:
        raise ValueError(f"timestep index {timestep} is outside a trajectory of {steps} steps: expected 0 to {steps - 1}")
