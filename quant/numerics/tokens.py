"""A linear or patch convolution as a matrix, its inputs as tokens."""
import torch.nn.functional as F
from torch import Tensor, nn


def matrix(module: nn.Module) -> Tensor:
    """View the weight of a linear or patch convolution as (O, I)."""
    return module.weight.flatten(1)


def as_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """Turn the input of a linear or patch convolution into (N, T, I)."""
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, stride=module.stride)  # (N, I, T)
        return patches.transpose(1, 2)
    return x if x.dim() == 3 else x.unsqueeze(1)
