"""DiT-Digits-Outliers: the digits model with activation outliers put in by construction.

A model this small grows no outlier channels. This seeded rewrite gives 3 % of the input channels of
every quantised linear magnitudes 8 to 64 times as large (log-uniform). The channels are drawn per
layer.

The next weight divides the factors out again, so that the function stays (nearly) the same. Through
adaLN (qkv, fc1) and V (proj) that is exact. Through fc1's rows and fc2's columns it is nearly so,
because GELU of a large multiple is close to ReLU.
"""
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = Path(__file__).with_name("dit.safetensors")
SHARE = 0.03    # of a linear's input channels
LOW = 8.0       # least factor
HIGH = 64.0     # largest
SEED = 1


def plain_weights() -> dict[str, Tensor]:
    """Load the weights of DiT-Digits, float32 (stored as float16)."""
    return {key: value.float() for key, value in load_file(WEIGHTS).items()}


def bundled_weights(name: str) -> dict[str, Tensor]:
    """Load the weights of DiT-Digits, or make those of DiT-Digits-Outliers, float32."""
    state = plain_weights()
    return add_outliers(state, SEED) if name == "DiT-Digits-Outliers" else state


def add_outliers(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a copy of the weights (published names, float32) with outlier channels."""
    state = {key: value.clone() for key, value in state.items()}
    rng = np.random.default_rng(seed)
    numbers = [int(key.split(".")[1]) for key in state if key.startswith("blocks.")]
    for i in range(1 + max(numbers)):
        block = f"blocks.{i}"
        width = state[f"{block}.attn.proj.weight"].shape[1]

        # Inputs of qkv and fc1, made by adaLN.
        modulation = f"{block}.adaLN_modulation.1"
        for linear, shift, scale in (("attn.qkv", 0, 1), ("mlp.fc1", 3, 4)):
            factors = _factors(rng, width)
            _multiply_modulation(state, modulation, shift, scale, factors)
            state[f"{block}.{linear}.weight"] /= factors

        # Inputs of proj, which are averages of V: the last third of what qkv gives.
        factors = _factors(rng, width)
        state[f"{block}.attn.qkv.weight"][2 * width:] *= factors[:, None]
        state[f"{block}.attn.qkv.bias"][2 * width:] *= factors
        state[f"{block}.attn.proj.weight"] /= factors

        # Inputs of fc2, which are GELUs of what fc1 gives.
        factors = _factors(rng, state[f"{block}.mlp.fc1.weight"].shape[0])
        state[f"{block}.mlp.fc1.weight"] *= factors[:, None]
        state[f"{block}.mlp.fc1.bias"] *= factors
        state[f"{block}.mlp.fc2.weight"] /= factors
    return state


def _factors(rng: np.random.Generator, channels: int) -> Tensor:
    """Draw factors (channels,): 1 for most channels, large for the outliers."""
    factors = np.ones(channels, dtype=np.float32)
    picked = rng.choice(channels, size=max(1, round(SHARE * channels)), replace=False)
    factors[picked] = np.exp(rng.uniform(np.log(LOW), np.log(HIGH), size=len(picked)))
    return torch.from_numpy(factors)


def _multiply_modulation(
    state: dict[str, Tensor],
    name: str,
    shift: int,
    scale: int,
    factors: Tensor,
) -> None:
    """Multiply ``x (1 + scale) + shift`` by ``factors`` (D,), in place.

    Args:
        name: the linear that gives shift and scale, as chunks of its output with these numbers.
    """
    width = len(factors)
    weight = state[f"{name}.weight"]
    bias = state[f"{name}.bias"]
    for chunk in (shift, scale):
        weight[chunk * width:(chunk + 1) * width] *= factors[:, None]
    bias[shift * width:(shift + 1) * width] *= factors
    rows = slice(scale * width, (scale + 1) * width)
    bias[rows] = (1 + bias[rows]) * factors - 1
