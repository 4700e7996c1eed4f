"""Checkpoints of this repository's older commits are still read, and compute the same.

The files in ``tests/golden/`` are of a DiT-Digits with random weights, calibrated for three steps.
They are compressed. adaLN weights repeat every four columns, so that 5.4 MB of format 1 become
1.4.

    format-1          commit 242d8d3  ditas W2A16: byte zero points; float32 factors, scales, adaLN
    format-2          commit b2b1b51  ditas W4A16: two-level scales, integer branch, adaLN of 8 bits
    format-3          commit 73e547f  repq-vit W2A8: static ranges, shifts, powers of root 2 from 1
    format-4          commit b4f607d  qdit W2A16: group sizes that differ from layer to layer
    format-4-static   commit b4f607d  repq-vit W2A8: ranges per timestep, powers from a scale
    format-5          commit de48453  ditas W2A16: a header with the architecture's configuration

``formats.npz`` holds inputs, and what the same commit computed from its own file, not folded.

Without activation quantisers outputs differ by rounding errors alone, and have to agree to 90 dB.
With them an input may lie on a rounding tie: its code may flip on another processor or after
folding. Through ten blocks flips grow to what 8 bits lose at all, 34 dB, so one whole forward tells
little. So each block also gets a recorded input. A flip leaves 44 dB and more there, and most
blocks have none.
A range that is 2 % off leaves no block more than 41 dB, so that the median of ten tells them apart.
"""
import json
import lzma
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, golden
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import UserError
from evaluation.metrics import sqnr_db
from quant import checkpoint

WEIGHT_ONLY = ("format-1", "format-2", "format-4", "format-5")
STATIC = ("format-3", "format-4-static")
FILES = WEIGHT_ONLY + STATIC

COMMON = {
    "model": "DiT-Digits",
    "image_size": 16,
    "num_classes": 10,
    "seed": 0,
    "num_sampling_steps": "3",
    "svd": "fast",
}
WRITTEN = {
    "format-1": {
        "format_version": 1,
        "recipe_name": "ditas",
        "weight_bit": 2,
        "act_bit": 16,
    },
    "format-2": {
        "format_version": 2,
        "recipe_name": "ditas",
        "weight_bit": 4,
        "act_bit": 16,
    },
    "format-3": {
        "format_version": 3,
        "recipe_name": "repq-vit",
        "weight_bit": 2,
        "act_bit": 8,
    },
    "format-4": {
        "format_version": 4,
        "recipe_name": "qdit",
        "weight_bit": 2,
        "act_bit": 16,
    },
    "format-4-static": {
        "format_version": 4,
        "recipe_name": "repq-vit act-steps=each",
        "weight_bit": 2,
        "act_bit": 8,
    },
    "format-5": {
        "format_version": 5,
        "recipe_name": "ditas:adaln-weight-bit=8",
        "weight_bit": 2,
        "act_bit": 16,
    },
}
# What a format did not know yet, and the only thing that its recipes did then.
IMPLIED = {
    "format-1": {
        "adaln_bits": 16,
        "scope": "blocks",
        "act_range": "dynamic",
    },
    "format-2": {
        "scope": "blocks",
        "act_range": "dynamic",
        "attention": "none",
        "weight": "nearest",
    },
    "format-3": {},
    "format-4": {},
    "format-4-static": {},
    "format-5": {},
}


# The product's API, in one place.

def load(path: Path, folded: bool = False) -> nn.Module:
    """Load the model of a checkpoint."""
    return checkpoint.load(path, folded=folded)[1]


def read_fields(path: Path) -> dict:
    """Read the header as the product does, with its recipe as a dict."""
    return asdict(checkpoint.read_header(path))


# The files.

@pytest.fixture(scope="module", params=FILES)
def name(request) -> str:
    return request.param


def unpack(name: str, folder: Path) -> Path:
    """Unpack an old checkpoint into a folder."""
    path = folder / f"{name}.safetensors"
    path.write_bytes(lzma.decompress((GOLDEN / f"{name}.safetensors.xz").read_bytes()))
    return path


@pytest.fixture(scope="module")
def old(name, tmp_path_factory) -> Path:
    return unpack(name, tmp_path_factory.mktemp("old"))


def stored_fields(path: Path) -> dict:
    """Read the header as it is written in the file."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["ditas"])


def renumbered(old: Path, version: int) -> Path:
    """Write a copy whose header claims another format."""
    fields = stored_fields(old) | {"format_version": version}
    path = old.with_name(f"claims-{version}.safetensors")
    save_file(load_file(old), path, metadata={"ditas": json.dumps(fields)})
    return path


def recorded(name: str) -> dict[str, Tensor]:
    """Load what the commit that wrote a file computed from it, and from what."""
    prefix = f"{name.replace('-', '', 1)}/"
    arrays = golden("formats")
    keys = [key for key in arrays if key.startswith(prefix)]
    return {key.removeprefix(prefix): torch.tensor(arrays[key]) for key in keys}


def listed(value):
    """Turn a tuple into a list, as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


# The tests.

def test_the_header_says_what_was_written(name, old):
    read, stored = read_fields(old), stored_fields(old)
    for key, value in (COMMON | WRITTEN[name]).items():
        assert stored[key] == value, key
        assert read[key] == value, key
    alphas = 40 if stored["recipe_name"].startswith("ditas") else 0
    assert len(stored["alphas"]) == alphas
    assert read["alphas"] == stored["alphas"]
    group_sizes = {32, 64, 128} if name == "format-4" else set()
    assert set(read["groups"].values()) == group_sizes
    assert read["groups"] == stored.get("groups", {})
    for key, value in stored["recipe"].items():
        assert listed(read["recipe"][key]) == value, key


def test_what_a_format_did_not_know_is_filled_in(name, old):
    read, stored = read_fields(old)["recipe"], stored_fields(old)["recipe"]
    for key, value in IMPLIED[name].items():
        assert read[key] == value, key
        assert key not in stored, key


@pytest.mark.parametrize("folded", [False, True])
def test_outputs_are_those_of_the_commit_that_wrote_the_file(name, old, folded):
    values, model = recorded(name), load(old, folded)
    output = model(values["x"], values["t"], values["y"])
    assert sqnr_db(values["output"], output) >= (90 if name in WEIGHT_ONLY else 28)
    if name in WEIGHT_ONLY:
        return
    assert len(model.blocks) == 10
    assert len(values["blocks"]) == 10
    fidelity = []
    for expected, block in zip(values["blocks"], model.blocks):
        tokens = block(values["tokens"], values["condition"])
        fidelity.append(sqnr_db(expected, tokens))
    assert sorted(fidelity)[5] >= 45, fidelity
    assert min(fidelity) >= 30, fidelity


def test_truncated_files_are_refused(old, tmp_path):
    half = tmp_path / "half.safetensors"
    half.write_bytes(old.read_bytes()[: old.stat().st_size // 2])
    with pytest.raises(UserError, match="truncated, or not a safetensors file"):
        load(half)


def test_formats_of_the_future_are_refused(old):
    with pytest.raises(UserError, match="has format version 99, expected 1 or 2"):
        load(renumbered(old, 99))


@pytest.mark.parametrize("name, claimed", [
    ("format-3", 4),
    ("format-4-static", 3),
])
def test_the_version_decides_how_powers_of_root_2_are_read(name, claimed, tmp_path):
    with pytest.raises(UserError, match="operands is"):
        load(renumbered(unpack(name, tmp_path), claimed))
