"""Measure the memory that quantising a large model takes, against the sum that it should be.

    python benchmarks/memory.py                         # 1 B parameters in bfloat16, ``rtn``
    python benchmarks/memory.py --recipe ditas
    python benchmarks/memory.py --depth 2               # 0.08 B parameters, a quick look

The model is diffusers' PixArt with random parameters, two images of 16 tokens and two steps. Every
stage's peak is the largest resident set of the process in it (``VmHWM``), less what it held before
the model was made.
"""
import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

import config
import ditas
from architectures.registry import architecture_of
from cli.memory import large_blocks_apart, return_freed_memory
from cli.parser import make_script_parser, run
from config import RECIPES, Recipe
from ditas import placing, quantizing

STEPS = 2
TOKENS, TEXT, TEXT_WIDTH = 16, 5, 24
MEGABYTE = 1e6


def resident(field: str) -> float:
    """Read a resident set of this process in MB: ``VmRSS`` now, ``VmHWM`` the largest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / MEGABYTE


def forget_peak() -> None:
    """Let the largest resident set begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def peak(name: str, peaks: dict[str, float], before: float) -> Iterator[None]:
    """Note the largest growth of the resident set, in MB, while open."""
    forget_peak()
    yield
    peaks[name] = resident("VmHWM") - before


def random_pixart(
    width: int, depth: int, kind: torch.dtype, head: int = 64, side: int = 8
) -> nn.Module:
    """Make a PixArt whose every parameter is random; nothing is made twice.

    Args:
        head: width of an attention's head.
        side: of the latents.
    """
    from diffusers import PixArtTransformer2DModel
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_attention_heads=width // head, attention_head_dim=head, in_channels=4,
            out_channels=8, num_layers=depth, sample_size=side, patch_size=2,
            cross_attention_dim=width,
            caption_channels=TEXT_WIDTH, use_additional_conditions=False).to(kind)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05, generator=generator)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def calls(kind: torch.dtype) -> list[dict]:
    """Draw the arguments of two images at each step."""
    generator = torch.Generator().manual_seed(1)
    return [{
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator).to(kind),
        "encoder_hidden_states": torch.randn(2, TEXT, TEXT_WIDTH, generator=generator).to(kind),
        "timestep": torch.full((2,), 900 - 800 * step),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    } for step in range(STEPS)]


def beside_codes(recipe: Recipe, weight: Tensor) -> float:
    """Count the bytes that stand beside the 4-bit codes of a weight (O, I), as in a file.

    They are a scale and a zero point per group, a step per output channel of two-level scales, and
    a low-rank branch of bfloat16 and int8. Zero points are codes.
    """
    outputs, inputs = weight.shape
    is_grouped = recipe.weight_granularity == "group"
    groups = weight.numel() // recipe.weight_group if is_grouped else outputs
    has_two_levels = recipe.weight_scales == "two-level"
    scales = groups + 2 * outputs if has_two_levels else 4 * groups
    rank = config.lowrank_rank(recipe, min(weight.shape))
    return scales + 0.5 * groups + rank * (2 * outputs + inputs)


def expected(model: nn.Module, recipe: str) -> dict[str, float]:
    """Sum up what should be in memory at the peak, in MB."""
    sites = architecture_of(model).sites(model, "blocks")
    first = [site for site in sites if site.block == sites[0].block]
    weights = [model.get_submodule(name).weight for site in sites for name in site.linears]
    block = [model.get_submodule(name).weight for site in first for name in site.linears]
    widths = [model.get_submodule(site.linears[0]).in_features for site in sites]
    # Maxima of every input at every step, and the factors of every candidate of a search.
    alphas = len(RECIPES[recipe].alphas)
    observed = 0 if recipe == "rtn" else 4 * (STEPS + alphas) * sum(widths)
    # Those of one weight at a time, int8.
    candidates = alphas * max(value.numel() for value in weights) if alphas > 1 else 0
    return {
        "weights": sum(value.nbytes for value in model.parameters()) / MEGABYTE,
        "codes": sum(value.numel() for value in weights) / 2 / MEGABYTE,
        "scales and branches": sum(beside_codes(RECIPES[recipe], value) for value in weights)
        / MEGABYTE,
        "a block in float32": 4 * sum(value.numel() for value in block) / MEGABYTE,
        "observers": observed / MEGABYTE,
        "candidates of a weight": candidates / MEGABYTE,
    }


def watched(name: str, place: object, peaks: dict[str, float], before: float) -> None:
    """Note the peak of a function of the story, whenever it is called."""
    function = getattr(place, name)

    def measured(*args, **kwargs):
        with peak(name, peaks, before):
            return function(*args, **kwargs)

    setattr(place, name, measured)


@large_blocks_apart()
def main(args: argparse.Namespace) -> None:
    """Quantise, and print the table."""
    kind = getattr(torch, args.dtype)
    torch.set_grad_enabled(False)
    return_freed_memory()
    before = resident("VmRSS")
    peaks: dict[str, float] = {}
    model = random_pixart(args.width, args.depth, kind)
    recorded = calls(kind)
    drive = None if args.recipe == "rtn" else lambda: [model(**call) for call in recorded]
    parts = expected(model, args.recipe)
    count = sum(value.numel() for value in model.parameters())
    peaks["float model"] = resident("VmRSS") - before
    for place, name in ((quantizing, "record_calls"), (quantizing, "look_into"),
                        (quantizing, "run_recipe"), (placing, "put_layers")):
        watched(name, place, peaks, before)
    ditas.quantize(
        model, drive, args.recipe, weight_bit=4, act_bit=8, backend=args.backend)
    return_freed_memory()
    peaks["quantised model"] = resident("VmRSS") - before

    print(f"{count / 1e9:.2f} B parameters, {args.dtype}, {args.recipe}, backend {args.backend}")
    print("| stage | MB at most |\n|---|---|")
    for stage, size in peaks.items():
        print(f"| {stage} | {size:.0f} |")
    print("\n| what should be there | MB |\n|---|---|")
    for part, size in parts.items():
        print(f"| {part} | {size:.0f} |")
    print(f"| sum | {sum(parts.values()):.0f} |")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = make_script_parser(__doc__)
    parser.add_argument("--recipe", default="rtn")
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--depth", type=int, default=26, help="blocks")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--backend", choices=("fake", "integer"), default="integer")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
