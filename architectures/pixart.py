"""diffusers' ``PixArtTransformer2DModel``: text to image, one modulation linear for all blocks.

A block adds a table T of its own to the shared vector t. ``x (1 + T_c + t_c) + T_h + t_h`` divided
by s has the same form with ``T_h / s``, ``(1 + T_c) / s - 1`` and ``t / s``. So the factors of a
block go into its table and into what enters the block. Cross attention reads an activation that no
LayerNorm makes, and text that no linear of the block makes: both divide their inputs themselves.
"""
from collections.abc import Iterator

from torch import Tensor, nn

from architectures.diffusers_blocks import DiffusersArchitecture
from architectures.sites import (
    AttentionSite,
    Call,
    Rows,
    SharedModulation,
    Site,
    Unit,
    inside,
    single,
    without_ends,
)
from architectures.units import single_layers


class PixArtArchitecture(DiffusersArchitecture):
    """Self attention, cross attention to text, and an MLP in every block."""

    name = "pixart"
    class_name = "PixArtTransformer2DModel"
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "added_cond_kwargs",
        "attention_mask",
        "encoder_attention_mask",
    )

    def sites(self, model: nn.Module, scope: str) -> list[Site]:
        blocks = [site for name in self.blocks(model) for site in _block_sites(name)]
        if scope == "blocks":
            return blocks
        modulation = single("adaln_single.linear", "modulation", None, per_image=True)
        if scope == "adaln":
            return [modulation, *blocks]
        everything = [single("pos_embed.proj", "patches", None), *_embedder_sites(model),
                      modulation, *blocks, *_output_sites()]
        return without_ends(everything) if scope == "inner" else everything

    def run_temporal(self, model: nn.Module, call: Call) -> tuple[Tensor, ...]:
        """Compute the shared modulation (N, 6D) and the embedding (N, D) that the output reads."""
        timesteps = call["timestep"]
        return model.adaln_single(
            timesteps, call.get("added_cond_kwargs"), batch_size=len(timesteps),
            hidden_dtype=call["hidden_states"].dtype)

    def output_units(self, model: nn.Module) -> list[Unit]:
        return single_layers(_output_sites())

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        return [AttentionSite(f"{name}.{attention}", f"{name}.{attention}.to_out.0")
                for name in self.blocks(model) for attention in ("attn1", "attn2")]


def _block_sites(block: str) -> Iterator[Site]:
    table = f"{block}.scale_shift_table"
    before_attention = SharedModulation(table, shift=0, scale=1, block=block, argument="timestep")
    before_mlp = SharedModulation(table, shift=3, scale=4, block=block, argument="timestep")
    yield Site(f"{block}.attn1.qkv", inside(f"{block}.attn1", "to_q", "to_k", "to_v"), "qkv", block,
               (before_attention,))
    yield single(f"{block}.attn1.to_out.0", "proj", block, Rows(f"{block}.attn1.to_v"))
    yield single(f"{block}.attn2.to_q", "cross q", block)
    yield Site(f"{block}.attn2.kv", inside(f"{block}.attn2", "to_k", "to_v"), "cross kv", block)
    yield single(f"{block}.attn2.to_out.0", "cross proj", block, Rows(f"{block}.attn2.to_v"))
    yield single(f"{block}.ff.net.0.proj", "fc1", block, before_mlp)
    yield single(f"{block}.ff.net.2", "fc2", block)


def _embedder_sites(model: nn.Module) -> Iterator[Site]:
    embedders = ["timestep_embedder"]
    if model.adaln_single.emb.use_additional_conditions:
        embedders += ["resolution_embedder", "aspect_ratio_embedder"]
    for embedder in embedders:
        for linear in inside(f"adaln_single.emb.{embedder}", "linear_1", "linear_2"):
            yield single(linear, "timestep", None, per_image=True)
    if model.caption_projection is not None:
        for linear in inside("caption_projection", "linear_1", "linear_2"):
            yield single(linear, "text", None)


def _output_sites() -> list[Site]:
    return [single("proj_out", "output", None)]
