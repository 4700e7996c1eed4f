"""Fold the smoothing factors into the layers before (DiTAS, section 4.4), so that sampling divides nothing but fc2's input.

Dividing the input of qkv and fc1 by ``s`` is dividing the output of the adaptive LayerNorm before them; dividing the input
of proj is dividing V. Of a quantised weight only the scales of its output channels change, never a code.
"""
from dataclasses import replace

import torch
from torch import Tensor, nn

from architectures.dit import MODULATION
from quant.layers.quantised import QuantizedLayer

_SHIFT1, _SCALE1, _SHIFT2, _SCALE2 = 0, 1, 3, 4  # chunks of the adaLN output: shift, scale, gate; attention, then MLP


def _divide_rows(model: nn.Module, layers: dict[str, QuantizedLayer], name: str, rows: slice, factors: Tensor) -> None:
    """Divide output channels of a linear, quantised or not, bias aside."""
    if name in layers:
        layers[name] = layers[name].divide_rows(rows, factors)
    else:
        model.get_submodule(name).weight[rows] /= factors[:, None]


def fold_modulation(model: nn.Module, layers: dict[str, QuantizedLayer], name: str, shift_chunk: int, scale_chunk: int, factors: Tensor,
                    offset: Tensor | None = None) -> None:
    """Add ``offset`` (D,) to ``x (1 + scale) + shift`` and divide by ``factors`` (D,) through the rows of the adaLN linear ``name``, in place."""
    width, bias = len(factors), model.get_submodule(name).bias
    shift = slice(shift_chunk * width, (shift_chunk + 1) * width)
    scale = slice(scale_chunk * width, (scale_chunk + 1) * width)
    for rows in (shift, scale):
        _divide_rows(model, layers, name, rows, factors)
    if offset is not None:
        bias[shift] += offset
    bias[shift] /= factors
    bias[scale] = (1 + bias[scale]) / factors - 1


def fold_value(model: nn.Module, layers: dict[str, QuantizedLayer], name: str, factors: Tensor) -> None:
    """Divide the values that attention averages by ``factors`` (D,): the last third of the output channels of qkv ``name``, in place."""
    rows = slice(2 * len(factors), 3 * len(factors))
    _divide_rows(model, layers, name, rows, factors)
    bias = model.get_submodule(name).bias
    if bias is not None:
        bias[rows] /= factors


@torch.no_grad()
def fold(model: nn.Module, layers: dict[str, QuantizedLayer]) -> dict[str, QuantizedLayer]:
    """Fold the factors and shifts of every qkv, fc1 (adaLN) and the factors of proj (V); fc2 keeps dividing.

    Args:
        model: with float linears where ``layers`` are not installed yet; its biases and float adaLN weights change in place.

    Returns:
        The layers to install.
    """
    layers = dict(layers)
    for i in range(len(model.blocks)):
        block = f"blocks.{i}"
        for name, chunks in ((f"{block}.attn.qkv", (_SHIFT1, _SCALE1)), (f"{block}.mlp.fc1", (_SHIFT2, _SCALE2))):
            layer = layers[name]
            if layer.smooth is not None:
                linear = model.get_submodule(name)
                if layer.shift is not None:
                    linear.bias.copy_(layer.bias(linear.bias))
                fold_modulation(model, layers, f"{block}.{MODULATION}", *chunks, layer.smooth, layer.shift)
                layers[name] = replace(layer, smooth=None, shift=None)
        proj = f"{block}.attn.proj"
        if layers[proj].smooth is not None:
            fold_value(model, layers, f"{block}.attn.qkv", layers[proj].smooth)
            layers[proj] = replace(layers[proj], smooth=None)
    return layers
