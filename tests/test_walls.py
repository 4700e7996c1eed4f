"""Walls between the rooms, read off the imports; DiT's names stay where they belong."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "architectures",
    "cli",
    "comparison",
    "diffusion",
    "ditas",
    "evaluation",
    "files",
    "quant",
    "report",
    "sampling",
)

# What a room must not import, with the reason.
FORBIDDEN = {
    # The method knows neither the command line nor any model, and fetches and judges nothing.
    "quant": {
        "cli",
        "ditas",
        "download",
        "cards",
        "models",
        "evaluation",
        "diffusion",
        "sampling",
        "report",
        "comparison",
        "examples",
        "benchmarks",
        "QuantDiT",
        "sample_merge_TAS",
        "compare",
    },
    # Judging knows no quantisation.
    "evaluation": {"quant", "cli", "comparison", "report"},
    # Data about transformers, nothing that computes with it.
    "architectures": {"quant", "cli", "ditas", "diffusion", "evaluation", "download", "sampling"},
    # The Python door to the method, beside the command line. Our DiT goes out through it, too, with
    # its schedule.
    "ditas": {"comparison", "download", "examples", "report", "sampling"},
    # Bytes on a disk.
    "files": {
        "quant",
        "cli",
        "models",
        "diffusion",
        "evaluation",
        "download",
        "sampling",
        "architectures",
    },
    # Sampling is the same for any transformer, quantised or not.
    "diffusion": {"quant", "cli", "evaluation", "download", "sampling", "architectures"},
    # What is fetched is float.
    "download": {"quant", "cli", "evaluation", "sampling", "report"},
    # What the command line knows of models by their names is there before PyTorch is.
    "cards": {"models", "quant", "cli", "evaluation", "download", "sampling", "architectures"},
    # The model knows nothing of what is done to it.
    "models": {"quant", "cli", "evaluation", "download", "sampling", "architectures"},
}
SCRIPTS = {"QuantDiT", "sample_merge_TAS", "compare", "evaluate"}


def sources(room: str) -> list[Path]:
    """List the files of a folder, or the single file of that name."""
    single = ROOT / f"{room}.py"
    return [single] if single.exists() else sorted((ROOT / room).rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    """Name the first part of everything a file imports, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            rooms.add(node.module.split(".")[0])
    return rooms


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_rooms_do_not_reach_through_walls(room):
    files = sources(room)
    assert files
    broken = {}
    for path in files:
        forbidden = imported_rooms(path) & FORBIDDEN[room]
        if forbidden:
            broken[str(path.relative_to(ROOT))] = sorted(forbidden)
    assert not broken


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_a_script(room):
    for path in sources(room):
        assert not imported_rooms(path) & SCRIPTS, path


DIT_NAMES = re.compile(r"attn|adaLN_|adaLN\.|x_embedder|pos_embed|t_embedder|blocks\.[\d{]")


def names_a_module(line: str) -> bool:
    """Tell whether a line names one of DiT's modules.

    An argument of PyTorch's names none, and an example in a flag's help binds nothing.
    """
    harmless = "attn_mask" in line or line.strip().startswith('help="')
    return DIT_NAMES.search(line) is not None and not harmless


@pytest.mark.parametrize("room", [
    "quant", "report", "sampling", "diffusion", "cli", "comparison", "ditas"])
def test_only_architectures_names_a_models_modules(room):
    named = []
    for path in sources(room):
        for line in path.read_text().splitlines():
            if names_a_module(line):
                named.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    assert not named


@pytest.mark.parametrize("line", [
    "model.blocks.0.mlp",
    "block.attn.qkv",
    "x_embedder.proj",
    "adaLN_modulation.1",
])
def test_the_forbidden_names_would_be_found(line):
    assert names_a_module(line)


def test_imports_are_found():
    assert "models" in imported_rooms(ROOT / "architectures" / "dit.py")
