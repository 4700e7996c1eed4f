"""A linear or patch convolution as a matrix, its inputs as tokens; all in float32."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def matrix(module: nn.Module, device: torch.device | None = None) -> Tensor:
    """View the weight of a linear or patch convolution as (O, I).

    Of another type, or on another device than that which is wanted, it is copied.
    """
    weight = module.weight if device is None else module.weight.to(device)
    return weight.flatten(1).float()


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape (O, I) of the weight of a linear or patch convolution as a matrix."""
    rows, *columns = module.weight.shape
    return rows, math.prod(columns)


def as_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """Turn the input of a linear or patch convolution into (N, T, I)."""
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, stride=module.stride)  # (N, I, T)
        return patches.transpose(1, 2).float()
    return rows_of_tokens(x)


def output_tokens(module: nn.Module, output: Tensor) -> Tensor:
    """Turn the output of a linear or patch convolution into (N, T, O)."""
    if output.dim() == 4 and isinstance(module, nn.Conv2d):
        return output.flatten(2).transpose(1, 2).float()
    return rows_of_tokens(output)


def rows_of_tokens(x: Tensor) -> Tensor:
    """Turn vectors (N, D) or (N, ..., D) into (N, T, D)."""
    rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
    return rows.float()
