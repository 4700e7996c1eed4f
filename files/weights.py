"""Plain tensors from .pt, .safetensors and folders, and into a model."""
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from architectures.dit import convert_diffusers
from errors import UserError


def load_into(model: torch.nn.Module, state: dict[str, Tensor], source: str, wanted: str) -> torch.nn.Module:
    """Give a skeleton (on the meta device) its float32 tensors.

    Raises:
        UserError: names or shapes differ.
    """
    expected = model.state_dict()
    missing, surplus = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or surplus:
        odd = f"lacks '{min(missing)}'" if missing else f"has the unexpected '{min(surplus)}'"
        raise UserError(f"'{source}' does not hold the weights of {wanted}: it {odd}; give matching --model, --image-size and weights")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise UserError(f"'{source}' does not hold the weights of {wanted}: '{key}' is {tuple(state[key].shape)}, "
                            f"expected {tuple(value.shape)}; give matching --model, --image-size and weights")
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Weights by published name from a .pt or .safetensors file or a diffusers folder; the ``ema`` entry if there is one.

    Raises:
        UserError: missing, truncated, or holding anything but tensors.
    """
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        found = [folder / f"diffusion_pytorch_model{end}" for end in (".safetensors", ".bin")]
        path = next((file for file in found if file.is_file()), found[0])
    if not path.is_file():
        raise UserError(f"weights '{path}' do not exist: give a .pt or .safetensors file, or a diffusers folder")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"cannot read weights '{path}': truncated, or not a file of plain tensors ({type(error).__name__})") from None
    if isinstance(state, dict) and isinstance(state.get("ema"), dict):
        state = state["ema"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"'{path}' holds no weights: expected tensors by name, or such a table under 'ema'")
    return convert_diffusers(state) if "proj_out_2.weight" in state else state
