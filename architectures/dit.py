"""Class-conditional DiT (Peebles & Xie, 2023): its sites, its blocks, and diffusers' names."""
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from architectures.sites import (
    AttentionSite,
    Call,
    Modulation,
    Rows,
    Site,
    Unit,
    linears_of,
    per_image_linears,
    single,
    without_ends,
)
from architectures.units import module_unit
from models import DiT

_CONFIGURATION = frozenset({
    "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes",
})


class DiTArchitecture:
    """``models.DiT``: four linears in every block, and a modulation of six chunks before them."""

    name = "dit"
    batched = ("x", "t", "y")
    clock = "t"

    def sites(self, model: DiT, scope: str) -> list[Site]:
        blocks = [site for name in self.blocks(model) for site in _block_sites(model, name)]
        if scope == "blocks":
            return blocks
        adaln = [_modulation_site(name) for name in self.blocks(model)] + blocks
        if scope == "adaln":
            return adaln
        everything = [*_input_sites(), *adaln, *_output_sites()]
        return without_ends(everything) if scope == "inner" else everything

    def blocks(self, model: DiT) -> list[str]:
        return [f"blocks.{i}" for i in range(len(model.blocks))]

    def advance(self, call: Call, output: Tensor) -> Call:
        return {**call, "x": output}

    def attentions(self, model: DiT) -> list[AttentionSite]:
        return [AttentionSite(f"{name}.attn", f"{name}.attn.proj") for name in self.blocks(model)]

    def temporal(self, model: DiT) -> list[str]:
        return per_image_linears(self.sites(model, "all"))

    def run_temporal(self, model: DiT, call: Call) -> tuple[Tensor, ...]:
        """Compute every modulation, (N, 6D) of the blocks and (N, 2D) of the final layer."""
        condition = model.condition(call["t"], call["y"])
        modulations = [block.adaLN_modulation for block in model.blocks]
        modulations.append(model.final_layer.adaLN_modulation)
        return tuple(modulation(condition) for modulation in modulations)

    def output_units(self, model: DiT) -> list[Unit]:
        return [module_unit("final_layer", tuple(linears_of(_output_sites())))]

    def configuration(self, model: DiT) -> dict[str, Any]:
        block = model.blocks[0]
        return {
            "input_size": model.input_size,
            "patch_size": model.patch_size,
            "in_channels": model.in_channels,
            "hidden_size": block.attn.proj.in_features,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "num_classes": model.num_classes,
        }

    def build(self, configuration: dict[str, Any]) -> DiT:
        if configuration.keys() != _CONFIGURATION:
            raise ValueError(f"expected the fields {sorted(_CONFIGURATION)} of a DiT, "
                             f"got {sorted(configuration)}")
        if not all(_is_number(value) for value in configuration.values()):
            raise ValueError(f"expected positive numbers for a DiT, got {configuration}")
        return DiT(**configuration)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1_000_000


def _block_sites(model: DiT, block: str) -> Iterator[Site]:
    width = model.get_submodule(f"{block}.attn.proj").in_features
    # Shift, scale and gate of attention, then of the MLP.
    modulation = f"{block}.adaLN_modulation.1"
    values = Rows(f"{block}.attn.qkv", start=2 * width, stop=3 * width)
    yield single(f"{block}.attn.qkv", "qkv", block, Modulation(modulation, shift=0, scale=1))
    yield single(f"{block}.attn.proj", "proj", block, values)
    yield single(f"{block}.mlp.fc1", "fc1", block, Modulation(modulation, shift=3, scale=4))
    # It stands behind a GELU, through which no factor passes.
    yield single(f"{block}.mlp.fc2", "fc2", block)


def _modulation_site(block: str) -> Site:
    return single(f"{block}.adaLN_modulation.1", "modulation", block, per_image=True)


def _input_sites() -> tuple[Site, ...]:
    return (
        single("x_embedder.proj", "patches", None),
        single("t_embedder.mlp.0", "timestep", None, per_image=True),
        single("t_embedder.mlp.2", "timestep", None, per_image=True),
    )


def _output_sites() -> tuple[Site, ...]:
    return (
        single("final_layer.adaLN_modulation.1", "output modulation", None, per_image=True),
        single("final_layer.linear", "output", None),
    )


# Names of diffusers' DiTTransformer2DModel as regular expressions, and ours.
_DIFFUSERS_NAMES = (
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\.",
     "y_embedder.embedding_table."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
)
_DIFFUSERS_QUERY = r"transformer_blocks\.(\d+)\.attn1\.to_q\.(weight|bias)"


def convert_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a diffusers ``DiTTransformer2DModel``; others pass through unchanged.

    Its per-block copies of the embedders are one here, q, k and v are stacked, and the fixed
    position embedding is not in its files.
    """
    if "proj_out_2.weight" not in state:
        return state
    converted = {}
    for key, value in state.items():
        query = re.fullmatch(_DIFFUSERS_QUERY, key)
        if query is not None:
            block, kind = query.groups()
            at = f"transformer_blocks.{block}.attn1"
            parts = [state[f"{at}.to_{part}.{kind}"] for part in "qkv"]
            converted[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
            continue
        renamed = _our_name(key)
        if renamed is not None:
            converted[renamed] = value
    return converted


def _our_name(key: str) -> str | None:
    """Translate a diffusers name; None where the tensor has no place of its own here."""
    for pattern, name in _DIFFUSERS_NAMES:
        renamed, count = re.subn("^" + pattern, name, key)
        if count:
            return renamed
    return None
