"""Checkpoints of older formats are read as they were meant."""
import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import checkpoint_header, noise_drive, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import RECIPES
from errors import UserError
from models import DiT
from quant import checkpoint
from quant.layers.quantised import QuantizedLayer
from quant.numerics.stowed import pack
from quant.pipeline import quantize_model
from quant.recipe import BitWidths


def digits_model() -> DiT:
    """Make a random model of the bundled one's shape."""
    return random_model(hidden_size=128, depth=10)


# The parts of a recipe that format 1 knew.
FORMAT_1_PARTS = (
    "balance",
    "timestep",
    "alphas",
    "weight_granularity",
    "weight_group",
    "act_granularity",
    "convention",
    "rank",
    "rounds",
    "keep",
    "order",
)


def format_1_tensors(layer: QuantizedLayer, name: str) -> dict[str, Tensor]:
    """Lay a layer out as format 1 did, with a branch that is a third of the layer's."""
    base = layer.weight.base
    return {
        f"{name}.codes": pack(base.codes, 4),
        f"{name}.scale": base.scale,
        f"{name}.zero": base.zero.to(torch.uint8),
        f"{name}.left": layer.weight.left,
        f"{name}.right": layer.weight.right / 3,
        f"{name}.smooth": layer.smoothing.factors,
    }


def test_an_older_format_is_still_read(tmp_path):
    """Format 1: zero points of a byte, float32 scales and factors, and adaLN in float32."""
    name = "blocks.2.mlp.fc1"
    recipe = replace(RECIPES["ditas"], weight_scales="float", adaln_bits=16)
    drive = noise_drive(2, torch.arange(2))
    layers = quantize_model(digits_model(), recipe, BitWidths(4, 8), drive).layers
    tensors = {}
    for key, value in digits_model().state_dict().items():
        if key.removesuffix(".weight") not in layers:
            tensors[key] = value
    for key, layer in layers.items():
        tensors |= format_1_tensors(layer, key)
    fields = asdict(checkpoint_header("ditas", recipe=recipe, format_version=1))
    fields["recipe"] = {part: fields["recipe"][part] for part in FORMAT_1_PARTS}
    del fields["groups"]
    path = tmp_path / "old.safetensors"
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, path, metadata={"ditas": json.dumps(fields)})

    old = checkpoint.read(path)
    assert old.header.recipe == recipe
    assert old.layers.keys() == layers.keys()
    weight = layers[name].weight
    expected = weight.base.dequantize() + weight.left @ weight.right / 3
    assert torch.allclose(old.layers[name].weight.dense(), expected)
    cpu = torch.device("cpu")
    assert checkpoint.backend_for(old.header, "auto", cpu, pytest.fail) == "fake"
    with pytest.raises(UserError, match="quantise again with weight_scales='two-level'"):
        checkpoint.backend_for(old.header, "integer", cpu, pytest.fail)


def test_powers_of_root_two_of_format_3_begin_at_1(tmp_path):
    model, recipe = digits_model(), RECIPES["repq-vit"]
    result = quantize_model(model, recipe, BitWidths(4, 8), noise_drive(1, torch.arange(2)))
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, model, result, checkpoint_header("repq-vit"))
    tensors = load_file(path)
    for key, value in tensors.items():
        if key.endswith(".operands"):
            tensors[key] = value[:3].clone()
    fields = asdict(checkpoint_header("repq-vit", format_version=3))
    save_file(tensors, path, metadata={"ditas": json.dumps(fields)})

    read = checkpoint.read(path).operands
    assert len(read) == 10
    for name, operands in read.items():
        assert operands.probabilities.scale == 1
        assert result.operands[name].probabilities.scale < 1
