"""Small configurations of diffusers' transformers with a call of each, as data.

Sizes are as small as a class allows: two blocks of every kind, heads of 16 channels, two images.
What is not a size is as in the published models.
"""
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from architectures.sites import Call

IMAGES = 2
TEXT = 5  # tokens
TEXT_WIDTH = 24


@dataclass(frozen=True)
class Noise:
    """Stands for random numbers of a shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Numbers:
    """Stands for a tensor of given numbers, repeated until it has a shape."""

    values: tuple
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Example:
    """A small model, and how it is called.

    Attributes:
        class_name: in diffusers.
        sizes: of its configuration, and what makes it the published variant.
        call: arguments of ``forward``, tensors described.
        variant: tells two examples of one class apart.
    """

    class_name: str
    sizes: dict[str, Any]
    call: dict[str, Any] = field(repr=False)
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.class_name} {self.variant}".strip()


def build(example: Example, **changes) -> nn.Module:
    """Make the model with random weights, in eval mode; ``changes`` override its configuration.

    Raises:
        ValueError: diffusers makes no such model.
    """
    # Not at the top of the file: diffusers is needed for its own models only.
    import diffusers
    kind = getattr(diffusers, example.class_name, None)
    if kind is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {example.class_name}")
    torch.manual_seed(0)
    return kind(**{**example.sizes, **changes}).eval()


def draw_call(example: Example) -> Call:
    """Make the tensors of an example's call."""
    generator = torch.Generator().manual_seed(0)

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, Noise):
            return torch.randn(leaf.shape, generator=generator)
        if isinstance(leaf, Numbers):
            count = torch.Size(leaf.shape).numel()
            repeated = torch.tensor(leaf.values, dtype=leaf.dtype)
            return repeated.repeat(-(-count // len(leaf.values)))[:count].reshape(leaf.shape)
        return leaf

    return pytree.tree_map(draw, {**example.call, "return_dict": False})


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Numbers:
    return Numbers((1,), shape, dtype)


LATENTS = Noise((IMAGES, 4, 8, 8))
VIDEO = Noise((IMAGES, 4, 2, 8, 8))
TOKENS = Noise((IMAGES, 16, 4))
PROMPT = Noise((IMAGES, TEXT, TEXT_WIDTH))
POOLED = Noise((IMAGES, 20))
STEPS = Numbers((700, 20), (IMAGES,), torch.int64)
PARTS = Numbers((0.7, 0.02), (IMAGES,))  # timesteps between 0 and 1
SIZES = Numbers((64,), (IMAGES, 2))  # of pictures, in pixels
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
IMAGE = {"sample_size": 8, "patch_size": 2, "in_channels": 4}
