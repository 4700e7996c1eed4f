"""Which architecture a model belongs to, found by its class or by the name in a checkpoint."""
from torch import nn

from architectures.diffusers_dit import DiffusersDiTArchitecture
from architectures.dit import DiTArchitecture
from architectures.pixart import PixArtArchitecture
from architectures.sites import Architecture

# By the name of the class, so that diffusers is imported only where a model of it is built.
_BY_CLASS: dict[str, Architecture] = {
    "DiT": DiTArchitecture(),
    "DiTTransformer2DModel": DiffusersDiTArchitecture(),
    "PixArtTransformer2DModel": PixArtArchitecture(),
}
_BY_NAME = {architecture.name: architecture for architecture in _BY_CLASS.values()}


def architecture_of(model: nn.Module) -> Architecture:
    """Find the architecture of a model.

    Raises:
        ValueError: the class of the model is not known.
    """
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
    if name not in _BY_NAME:
        raise ValueError(f"architecture {name!r} is unknown here: "
                         f"expected one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
