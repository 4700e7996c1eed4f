"""Diffusion Transformers (Peebles & Xie, 2023), compatible with the published checkpoints.

Shapes: N images, C latent channels, H = W latent side, T tokens, D width, p patch side.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cards import ModelCard

MLP_RATIO = 4          # channels inside an MLP for each of its inputs
CLASS_DROPOUT = 0.1    # share of labels that training replaces by the null label
GUIDED_CHANNELS = 3    # the published model guides only the first three latent channels


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens ``x`` (N, T, D) by per-image vectors (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)  # (N, T, D)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Embed timesteps ``t`` (N,) as ``dim/2`` cosines, then as many sines, (N, dim) float32.

    The frequencies are spread over ``dim/2`` steps, as in the published model. (diffusers spreads
    them over ``dim/2 - 1``.)
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)  # (dim/2,)
    freqs = torch.exp(-np.log(max_period) * exponents / half)  # (dim/2,)
    angles = t[:, None].float() * freqs[None]  # (N, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, dim)


def sincos_position_embedding(dim: int, side: int) -> Tensor:
    """Embed the places of a ``side`` x ``side`` token grid in sines and cosines, (T, dim) float32.

    The first half of the channels encodes the column, the second half the row.
    """
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))  # (dim/4,)
    angles = np.arange(side, dtype=np.float64)[:, None] * omega[None]  # (side, dim/4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (side, dim/2)
    columns = np.tile(axis, (side, 1))  # (T, dim/2)
    rows = np.repeat(axis, side, axis=0)  # (T, dim/2)
    return torch.from_numpy(np.concatenate([columns, rows], axis=1)).float()


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) to vectors (N, D): an MLP on their sinusoids."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        embedding = timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """Class labels (N,) to vectors (N, D).

    Index ``num_classes`` is the null label of classifier-free guidance.
    """

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        self.num_classes = num_classes

    def forward(self, y: Tensor) -> Tensor:
        if self.training:
            drop = torch.rand(y.shape[0], device=y.device) < CLASS_DROPOUT
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)  # (N, D)


class PatchEmbedder(nn.Module):
    """Latents (N, C, H, W) to tokens (N, T, D): a linear map of every patch."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, T, D)


class TanhGELU(nn.Module):
    """``x (1 + tanh u) / 2`` with u = sqrt(2 / pi) (x + 0.044715 x^3).

    Where a compiler fuses it, it is computed as ``x sigmoid(2 u)``. The two are equal, and compiled
    code takes a third of the time with a sigmoid.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))


class Attention(nn.Module):
    """Every token (N, T, D) looks at all of its image, with several heads."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, T, 3, heads, D/heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D/heads)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # (N, T, D)


class Mlp(nn.Module):
    """Every token (N, T, D) by itself: up to more channels, GELU, and down again."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, MLP_RATIO * hidden_size)
        self.act = TanhGELU()
        self.fc2 = nn.Linear(MLP_RATIO * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # (N, T, D)


class DiTBlock(nn.Module):
    """Attention and MLP: an adaptive LayerNorm before each, a gate behind it (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)  # (N, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)  # each (N, D)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))  # (N, T, D)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens to the values of their patches, behind an adaptive LayerNorm."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # each (N, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p*p*2C)


class DiT(nn.Module):
    """Predicts noise and variance from noisy latents, a timestep and a class label.

    ``forward(x, t, y)`` takes x (N, C, H, W), t (N,) in 0..999 and y (N,) in 0..num_classes. It
    gives (N, 2C, H, W): the noise, then the interpolation coefficient of the log variance (see
    ``diffusion.schedule``). Weights may be bfloat16; the output has the type of ``x``.
    """

    def __init__(
        self,
        input_size: int = 32,       # latent cells per side
        patch_size: int = 2,        # latent cells per token and side
        in_channels: int = 4,       # of the latents
        hidden_size: int = 1152,    # channels of a token
        depth: int = 28,            # blocks
        num_heads: int = 16,        # of attention
        num_classes: int = 1000,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels
        self.input_size = input_size
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        grid = sincos_position_embedding(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(grid.unsqueeze(0), requires_grad=False)  # (1, T, D)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def initialize_weights(self) -> None:
        """Initialise for training: Xavier linears, zero modulation and output (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)

        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)

        zeroed = [block.adaLN_modulation[1] for block in self.blocks]
        zeroed += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for linear in zeroed:
            nn.init.zeros_(linear.weight)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Arrange tokens (N, T, p*p*2C) as an image (N, 2C, H, W)."""
        n, p = len(x), self.patch_size
        side = self.input_size // p
        x = x.reshape(n, side, side, p, p, self.out_channels)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (N, 2C, side, p, side, p)
        return x.reshape(n, self.out_channels, self.input_size, self.input_size)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Make what enters the first block: tokens (N, T, D) and the conditioning (N, D)."""
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        return tokens, self.condition(t, y)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """Make the conditioning (N, D) of timesteps (N,) and labels (N,)."""
        return self.t_embedder(t) + self.y_embedder(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        dtype = x.dtype
        x, c = self.embed(x, t, y)
        for block in self.blocks:
            x = block(x, c)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, c)).to(dtype)  # (N, 2C, H, W)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Predict with classifier-free guidance.

        Args:
            x: (2N, C, H, W), whose second half is ignored.
            t: (2N,).
            y: (2N,): the labels, then as many null labels.
            cfg_scale: guidance scale.

        Returns:
            (2N, 2C, H, W). Both halves carry the guided noise in the first three latent channels;
            the remaining channels are each half's own, as published.
        """
        half = x[: len(x) // 2]
        # Not self.forward(...): forward hooks have to see guided calls too.
        out = self(torch.cat([half, half]), t, y)  # (2N, 2C, H, W)
        noise, rest = out[:, :GUIDED_CHANNELS], out[:, GUIDED_CHANNELS:]
        cond, uncond = noise.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def build_model(card: ModelCard, image_size: int, num_classes: int | None = None) -> DiT:
    """Make a randomly initialised model for images of ``image_size`` pixels.

    Args:
        num_classes: labels that the model knows; None for the card's.

    Raises:
        ValueError: the model has no such image size.
    """
    if image_size not in card.image_sizes:
        expected = " or ".join(str(size) for size in card.image_sizes)
        raise ValueError(f"image size {image_size} does not fit this model: expected {expected}")
    return DiT(
        input_size=image_size // card.downsample,
        patch_size=card.patch_size,
        hidden_size=card.hidden_size,
        depth=card.depth,
        num_heads=card.num_heads,
        num_classes=num_classes or card.num_classes,
    )
