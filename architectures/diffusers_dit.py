"""diffusers' ``DiTTransformer2DModel``: the DiT of the hub, with queries, keys and values apart."""
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from architectures.diffusers_blocks import DiffusersArchitecture
from architectures.sites import (
    AttentionSite,
    Call,
    Modulation,
    Rows,
    Site,
    Unit,
    inside,
    single,
    without_ends,
)
from architectures.units import single_layers


class DiffusersDiTArchitecture(DiffusersArchitecture):
    """Every block holds its own copy of the embedders, and a modulation of six chunks."""

    name = "diffusers-dit"
    class_name = "DiTTransformer2DModel"
    batched = ("hidden_states", "timestep", "class_labels")

    def sites(self, model: nn.Module, scope: str) -> list[Site]:
        names = self.blocks(model)
        blocks = [site for name in names for site in _block_sites(name)]
        if scope == "blocks":
            return blocks
        modulation = [single(f"{name}.norm1.linear", "modulation", name, per_image=True)
                      for name in names]
        if scope == "adaln":
            return modulation + blocks
        embedders = [site for name in names for site in _embedder_sites(name)]
        everything = [single("pos_embed.proj", "patches", None),
                      *embedders, *modulation, *blocks, *_output_sites()]
        return without_ends(everything) if scope == "inner" else everything

    def run_temporal(self, model: nn.Module, call: Call) -> tuple[Tensor, ...]:
        """Compute every modulation, (N, 6D) of the blocks and (N, 2D) of the output."""
        norms = [block.norm1 for block in model.transformer_blocks]
        dtype = call["hidden_states"].dtype
        conditions = [norm.emb(call["timestep"], call["class_labels"], hidden_dtype=dtype)
                      for norm in norms]
        modulations = [norm.linear(norm.silu(condition))
                       for norm, condition in zip(norms, conditions)]
        # The output has no embedder of its own: it shares that of the first block.
        return *modulations, model.proj_out_1(F.silu(conditions[0]))

    def output_units(self, model: nn.Module) -> list[Unit]:
        return single_layers(_output_sites())

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        return [AttentionSite(f"{name}.attn1", f"{name}.attn1.to_out.0")
                for name in self.blocks(model)]


def _block_sites(block: str) -> Iterator[Site]:
    modulation = f"{block}.norm1.linear"
    queries_keys_values = inside(f"{block}.attn1", "to_q", "to_k", "to_v")
    yield Site(f"{block}.attn1.qkv", queries_keys_values, "qkv", block,
               (Modulation(modulation, shift=0, scale=1),))
    yield single(f"{block}.attn1.to_out.0", "proj", block, Rows(f"{block}.attn1.to_v"))
    yield single(f"{block}.ff.net.0.proj", "fc1", block, Modulation(modulation, shift=3, scale=4))
    yield single(f"{block}.ff.net.2", "fc2", block)


def _embedder_sites(block: str) -> Iterator[Site]:
    for linear in inside(f"{block}.norm1.emb.timestep_embedder", "linear_1", "linear_2"):
        yield single(linear, "timestep", block, per_image=True)


def _output_sites() -> list[Site]:
    return [single("proj_out_1", "output modulation", None, per_image=True),
            single("proj_out_2", "output", None)]
