"""Which architecture a model belongs to, found by its class or by the name in a checkpoint."""
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from architectures.diffusers_dit import DiffusersDiTArchitecture
from architectures.dit import DiTArchitecture
from architectures.pixart import PixArtArchitecture
from architectures.sites import Architecture
from cards import DiT_models
from models import build_model

# By the name of the class, so that diffusers is imported only where a model of it is built.
_DIT = DiTArchitecture()
_BY_CLASS: dict[str, Architecture] = {
    "DiT": _DIT,
    # The same as a model of diffusers (ditas/dit.py).
    "DitasDiT": _DIT,
    "DiTTransformer2DModel": DiffusersDiTArchitecture(),
    "PixArtTransformer2DModel": PixArtArchitecture(),
}
_BY_NAME = {architecture.name: architecture for architecture in _BY_CLASS.values()}

# The attribute of a model that holds what was found in it.
_FOUND = "ditas_architecture"


def describe(model: nn.Module, architecture: Architecture) -> None:
    """Let a model carry its architecture, whatever its class; its copies will, too."""
    setattr(model, _FOUND, architecture)


def is_known(model: nn.Module) -> bool:
    """Tell whether the architecture of a model can be found."""
    return _FOUND in vars(model) or type(model).__name__ in _BY_CLASS


def architecture_of(model: nn.Module) -> Architecture:
    """Find the architecture of a model: the one that it carries, or that of its class.

    Raises:
        ValueError: it carries none, and its class is not known.
    """
    if _FOUND in vars(model):
        return vars(model)[_FOUND]
    kind = type(model).__name__
    if kind not in _BY_CLASS:
        raise ValueError(f"a model of class {kind} is unknown here: "
                         f"expected one of {', '.join(_BY_CLASS)}")
    return _BY_CLASS[kind]


def architecture_named(name: str) -> Architecture:
    """Find the architecture that a checkpoint names.

    Raises:
        ValueError: there is none of that name.
    """
    check_architecture(name)
    return _BY_NAME[name]


def check_architecture(name: str) -> None:
    """Raise a ``ValueError`` if there is no architecture of that name."""
    if name not in _BY_NAME:
        raise ValueError(f"architecture {name!r} is unknown here: "
                         f"expected one of {', '.join(_BY_NAME)}")


def registered_configuration(
    model: str, image_size: int, num_classes: int
) -> tuple[str, dict[str, Any]]:
    """Find architecture and configuration of a model of the command line, by its name.

    Raises:
        ValueError: there is no such model, or it has no such image size.
    """
    if model not in DiT_models:
        raise ValueError(f"{model} is unknown here")
    architecture = _BY_CLASS["DiT"]
    with torch.device("meta"):
        empty = build_model(DiT_models[model], image_size, num_classes)
    return architecture.name, architecture.configuration(empty)


def empty_model(architecture: Architecture, configuration: dict[str, Any]) -> nn.Module:
    """Build a model whose parameters are on the meta device.

    Buffers that no file holds, such as position embeddings, are computed.
    """
    with torch.device("meta"):
        model = architecture.build(configuration)
    if any(module._non_persistent_buffers_set for module in model.modules()):
        with init_empty_weights(include_buffers=False):
            model = architecture.build(configuration)
    return model
