"""Class-conditional DiT (Peebles & Xie, 2023)."""
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


MODULATION = "adaLN_modulation.1"


PATCHES = "x_embedder.proj"


SCOPES = ("blocks", "adaln", "all")


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The four linears of every block, by state-dict name, in the order in which a forward pass meets them."""
    return {f"blocks.{i}.{name}": block.get_submodule(name) for i, block in enumerate(model.blocks) for name in BLOCK_LINEARS}


def modulation_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears behind every block's adaptive LayerNorms, by state-dict name."""
    return {f"blocks.{i}.{MODULATION}": block.get_submodule(MODULATION) for i, block in enumerate(model.blocks)}


def scope_linears(model: nn.Module, scope: str) -> dict[str, nn.Module]:
    """What a recipe of this scope quantises, by state-dict name.

    ``blocks``: the four linears of every block; ``adaln``: its modulation too; ``all``: every linear and the patch embedding,
    a convolution whose patches do not overlap, which is a linear of patches.
    """
    if scope == "blocks":
        return block_linears(model)
    if scope == "adaln":
        return modulation_linears(model) | block_linears(model)
    outer = (PATCHES, "t_embedder.mlp.0", "t_embedder.mlp.2")
    last = (f"final_layer.{MODULATION}", "final_layer.linear")
    return {name: model.get_submodule(name) for name in outer} | scope_linears(model, "adaln") | {name: model.get_submodule(name) for name in last}


def timed(name: str) -> bool:
    """Whether the input of this layer is a vector per image that comes from the timestep embedding."""
    return name.endswith(MODULATION) or name.startswith("t_embedder.")


class LayerPlace(NamedTuple):
    """A layer's role, and its block (None outside the blocks), as reports need them."""

    role: str
    block: str | None


def layer_places(model: nn.Module) -> dict[str, LayerPlace]:
    """Tell where each linear that any recipe quantises stands, by state-dict name."""
    places = {}
    for name in scope_linears(model, "all"):
        inside = re.match(r"(blocks\.\d+)\.(.+)", name)
        if inside is None:
            places[name] = LayerPlace(name, None)
        elif inside[2] == MODULATION:
            places[name] = LayerPlace("adaLN_modulation", inside[1])
        else:
            places[name] = LayerPlace(inside[2].split(".")[1], inside[1])
    return places


_DIFFUSERS = (
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\.", "y_embedder.embedding_table."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
)


def convert_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a diffusers ``DiTTransformer2DModel``.

    Its per-block copies of the embedders are one, and it does not store the fixed position embedding.
    """
    converted = {}
    for key, value in state.items():
        for pattern, name in _DIFFUSERS:
            renamed, count = re.subn("^" + pattern, name, key)
            if count:
                converted[renamed] = value
                break
        else:
            if match := re.fullmatch(r"transformer_blocks\.(\d+)\.attn1\.to_q\.(weight|bias)", key):
                block, kind = match.groups()
                parts = [state[f"transformer_blocks.{block}.attn1.to_{part}.{kind}"] for part in "qkv"]
                converted[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return converted
