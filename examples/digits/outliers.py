"""DiT-Digits-Outliers: the digits weights with activation outliers put in by construction, computing (nearly) the same function.

A model this small grows no outlier channels. This seeded rewrite gives 3 % of the input channels of every quantised linear,
drawn per layer, magnitudes 8 to 64 times as large (log-uniform) and divides them out again in the next weight: exactly, through
adaLN (qkv, fc1) and V (proj); nearly, through fc1's rows and fc2's columns, where GELU of a large multiple is close to ReLU.
"""
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = Path(__file__).with_name("dit.safetensors")
SHARE, LOW, HIGH, SEED = 0.03, 8.0, 64.0, 1


def plain_weights() -> dict[str, Tensor]:
    """Weights of DiT-Digits, float32 (stored as float16)."""
    return {key: value.float() for key, value in load_file(WEIGHTS).items()}


def outlier_weights() -> dict[str, Tensor]:
    """Weights of DiT-Digits-Outliers."""
    return add_outliers(plain_weights(), SEED)


def add_outliers(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The weights (published names, float32) with outlier channels, as a new table."""
    state = {key: value.clone() for key, value in state.items()}
    rng = np.random.default_rng(seed)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for i in range(depth):
        block = f"blocks.{i}."
        width = state[block + "attn.proj.weight"].shape[1]
        for linear, shift, scale in (("attn.qkv", 0, 1), ("mlp.fc1", 3, 4)):
            factors = _factors(rng, width)
            _multiply_modulation(state, block + "adaLN_modulation.1", shift, scale, factors)
            state[block + linear + ".weight"] /= factors
        factors = _factors(rng, width)
        state[block + "attn.qkv.weight"][2 * width:] *= factors[:, None]
        state[block + "attn.qkv.bias"][2 * width:] *= factors
        state[block + "attn.proj.weight"] /= factors
        factors = _factors(rng, state[block + "mlp.fc1.weight"].shape[0])
        state[block + "mlp.fc1.weight"] *= factors[:, None]
        state[block + "mlp.fc1.bias"] *= factors
        state[block + "mlp.fc2.weight"] /= factors
    return state


def _factors(rng: np.random.Generator, channels: int) -> Tensor:
    factors = np.ones(channels, dtype=np.float32)
    picked = rng.choice(channels, size=max(1, round(SHARE * channels)), replace=False)
    factors[picked] = np.exp(rng.uniform(np.log(LOW), np.log(HIGH), size=len(picked)))
    return torch.from_numpy(factors)


def _multiply_modulation(state: dict[str, Tensor], name: str, shift: int, scale: int, factors: Tensor) -> None:
    """Multiply ``x (1 + scale) + shift`` by ``factors`` (D,)."""
    width = len(factors)
    weight, bias = state[name + ".weight"], state[name + ".bias"]
    for chunk in (shift, scale):
        weight[chunk * width:(chunk + 1) * width] *= factors[:, None]
    bias[shift * width:(shift + 1) * width] *= factors
    rows = slice(scale * width, (scale + 1) * width)
    bias[rows] = (1 + bias[rows]) * factors - 1
