"""The tensors that a module keeps beside its parameters."""
from torch import Tensor, nn


def register_buffers(module: nn.Module, **buffers: Tensor | None) -> None:
    """Register each tensor as the module's buffer of that name; None stands for its absence."""
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
