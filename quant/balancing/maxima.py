"""Channel maxima to smoothing factors: TAS (DiTAS, section 4), SmoothQuant (Xiao et al., 2023)."""
from torch import Tensor


def aggregate(absmax: Tensor, balance: str, timestep: int) -> Tensor:
    """Reduce channel maxima per sampling step (steps, I) to channel magnitudes ``a`` (I,).

    Args:
        balance: ``tas`` takes the maximum over all steps, ``smoothquant`` those of one step.
        timestep: that step's index in the order of sampling: 0 is the noisiest, negative ones
            count from the end.
    """
    return absmax.amax(0) if balance == "tas" else absmax[timestep]


def smoothing_factors(act: Tensor, weight: Tensor, alpha: float, floor: float) -> Tensor:
    """Compute ``s_j = max(a_j^alpha / w_j^(1 - alpha), floor)``, (I,) (SmoothQuant, eq. 4).

    Args:
        act: ``a`` (I,), channel magnitudes of the activation.
        weight: (O, I); ``w_j`` is its largest magnitude in column j.
        alpha: migration strength in [0, 1].
        floor: the least that ``a``, ``w`` and the factors are taken to be.
    """
    a = act.clamp(min=floor)
    w = weight.abs().amax(0).clamp(min=floor)
    return (a.pow(alpha) / w.pow(1 - alpha)).clamp(min=floor)


def check_step(timestep: int, steps: int) -> None:
    """Raise a ``ValueError`` unless ``timestep`` is an index of a trajectory of ``steps`` steps."""
    if not -steps <= timestep < steps:
        raise ValueError(
            f"timestep index {timestep} is outside a trajectory of {steps} steps: "
            f"expected 0 to {steps - 1}"
        )
