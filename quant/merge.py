"""Fold the smoothing factors into the layers before (DiTAS, section 4.4), so that sampling divides nothing but fc2's input.

Dividing the input of qkv and fc1 by ``s`` is dividing the output of the adaptive LayerNorm before them; dividing the input
of proj is dividing V.
"""
import torch
from torch import Tensor, nn

_SHIFT1, _SCALE1, _SHIFT2, _SCALE2 = 0, 1, 3, 4  # chunks of the adaLN output: shift, scale, gate; attention, then MLP


@torch.no_grad()
def fold_modulation(linear: nn.Linear, shift_chunk: int, scale_chunk: int, factors: Tensor) -> None:
    """Divide ``x (1 + scale) + shift`` by ``factors`` (D,) through the rows of the adaLN linear, in place."""
    width = len(factors)
    shift = slice(shift_chunk * width, (shift_chunk + 1) * width)
    scale = slice(scale_chunk * width, (scale_chunk + 1) * width)
    linear.weight[shift] /= factors[:, None]
    linear.bias[shift] /= factors
    linear.weight[scale] /= factors[:, None]
    linear.bias[scale] = (1 + linear.bias[scale]) / factors - 1


@torch.no_grad()
def fold_value(qkv: nn.Module, factors: Tensor) -> None:
    """Divide the values that attention averages by ``factors`` (D,): the last third of qkv's output channels, in place."""
    rows = slice(2 * len(factors), 3 * len(factors))
    qkv.weight[rows] /= factors[:, None]
    if qkv.bias is not None:
        qkv.bias[rows] /= factors


def fold(model: nn.Module) -> nn.Module:
    """Fold the factors of every qkv, fc1 (adaLN) and proj (V) of an installed model, in place; fc2 keeps dividing."""
    for block in model.blocks:
        for linear, chunks in ((block.attn.qkv, (_SHIFT1, _SCALE1)), (block.mlp.fc1, (_SHIFT2, _SCALE2))):
            if linear.smooth is not None:
                fold_modulation(block.adaLN_modulation[1], *chunks, linear.smooth)
                linear.smooth = None
        if block.attn.proj.smooth is not None:
            fold_value(block.attn.qkv, block.attn.proj.smooth)
            block.attn.proj.smooth = None
    return model
