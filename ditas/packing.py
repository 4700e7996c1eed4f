"""Quantised linears keep their codes: a state dict holds these, at their true width.

The module that computes may hold the same weight expanded, or packed for a processor. What a file
needs stays beside it on the CPU, in the words of ``quant.checkpoint.tensors``.
"""
from typing import Any

from torch import Tensor, nn

from quant.checkpoint.tensors import write_layer
from quant.layers.quantised import QuantizedLayer

Tensors = dict[str, Tensor]


def packed(layer: QuantizedLayer, bias: Tensor | None) -> Tensors:
    """Write a quantised linear and its bias as tensors on the CPU."""
    tensors = write_layer("", layer)
    named = {name.removeprefix("."): value for name, value in tensors.items()}
    if bias is not None:
        named["bias"] = bias.float()
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}


def packed_bytes(layer: QuantizedLayer) -> int:
    """Count the bytes of a quantised linear in a file, without its bias."""
    return sum(value.nbytes for value in packed(layer, None).values())


def remember(module: nn.Module, layer: QuantizedLayer, bias: Tensor | None) -> None:
    """Let a module that computes a quantised linear keep its codes, and have them saved.

    Args:
        bias: the linear's own, as it was before ``QuantizedLayer.bias``.
    """
    keep(module, packed(layer, bias))


def keep(module: nn.Module, tensors: Tensors) -> None:
    """Let a module be saved as these tensors."""
    module.in_file = tensors
    module.register_state_dict_post_hook(_save_packed)


def is_packed(module: nn.Module) -> bool:
    """Tell whether a module is saved as something else than it holds."""
    return "in_file" in vars(module)


def _save_packed(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Put what a file needs in the place of what computes."""
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    state.update({f"{prefix}{name}": value for name, value in module.in_file.items()})
