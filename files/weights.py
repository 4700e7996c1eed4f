"""Plain tensors: out of .pt files, .safetensors files and folders, and into a model."""
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from errors import UserError

# Everything that the two readers raise on damaged files.
_READ_ERRORS = (
    SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError)


def load_into(
    model: torch.nn.Module,
    state: dict[str, Tensor],
    source: str,
    wanted: str,
) -> torch.nn.Module:
    """Give a skeleton (on the meta device) its tensors, as float32, and return it.

    Args:
        source: where the tensors come from, for messages.
        wanted: what the model is, for messages.

    Raises:
        UserError: names or shapes differ.
    """
    other_model = f"'{source}' does not hold the weights of {wanted}"
    advice = "give matching --model, --image-size and weights"
    expected = model.state_dict()
    missing = expected.keys() - state.keys()
    surplus = state.keys() - expected.keys()
    if missing:
        raise UserError(f"{other_model}: it lacks '{min(missing)}'; {advice}")
    if surplus:
        raise UserError(f"{other_model}: it has the unexpected '{min(surplus)}'; {advice}")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise UserError(
                f"{other_model}: '{key}' is {tuple(state[key].shape)}, "
                f"expected {tuple(value.shape)}; {advice}")
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a .pt or .safetensors file or a diffusers folder.

    Where a file holds several tables, the one under ``ema`` is taken.

    Raises:
        UserError: missing, truncated, or holding anything but tensors.
    """
    if path.is_dir():
        path = _weights_of_folder(path)
    if not path.is_file():
        raise UserError(
            f"weights '{path}' do not exist: give a .pt or .safetensors file, "
            "or a diffusers folder")
    try:
        state = _read_tensors(path)
    except _READ_ERRORS as error:
        raise UserError(
            f"cannot read weights '{path}': truncated, or not a file of plain tensors "
            f"({type(error).__name__})") from None
    if isinstance(state, dict) and isinstance(state.get("ema"), dict):
        state = state["ema"]
    if not _is_table_of_tensors(state):
        raise UserError(
            f"'{path}' holds no weights: expected tensors by name, or such a table under 'ema'")
    return state


def _weights_of_folder(folder: Path) -> Path:
    """Find the transformer's file in a diffusers folder, or in a copy of its whole repository."""
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    safetensors = folder / "diffusion_pytorch_model.safetensors"
    pickled = folder / "diffusion_pytorch_model.bin"
    return pickled if pickled.is_file() and not safetensors.is_file() else safetensors


def _read_tensors(path: Path):
    """Read whatever the file holds; code in a pickle is refused, not run."""
    if path.suffix == ".safetensors":
        return load_file(path)
    # Only files of the current format can be mapped.
    mappable = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)


def _is_table_of_tensors(state) -> bool:
    """Tell whether ``state`` is a table of tensors and nothing else."""
    return isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
