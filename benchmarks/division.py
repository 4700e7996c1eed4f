"""Measure what dividing by smoothing factors at run time costs a compiled forward pass.

    python benchmarks/division.py                # of PixArt-Sigma's size
    python benchmarks/division.py --depth 4      # with fewer blocks

A transformer of PixArt-Sigma's size (28 blocks of 16 heads of 72) with random parameters is
quantised to W4A8 and runs on integers, its blocks compiled, on two images of 256 tokens. All
linears of attention and MLP divide their input by random factors, or none does. Both take turns;
each round goes in the other order, and gives a ratio of wall times and one of processor times.
Other jobs on the machine disturb the latter less.
"""
import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.memory import TEXT_WIDTH, random_pixart
from benchmarks.subjects import block_sites
from cli.parser import make_script_parser, run
from config import RECIPES
from quant.activations.quantisers import Activation
from quant.install import install
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import NO_SMOOTHING, Smoothing
from quant.recipe import act_spec, weight_spec
from quant.weights.low_rank import without_branch
from quant.weights.rounding import quantize_weight

# Both models compile the same block's code, each with other modules.
torch._dynamo.config.recompile_limit = 64

WIDTH, HEAD = 1152, 72
IMAGES, SIDE, TEXT = 2, 32, 120
RECIPE = RECIPES["smoothquant"]
WAYS = ("no factors", "divided at run time")


def quantised(depth: int, kind: torch.dtype, is_divided: bool) -> nn.Module:
    """Make a model on integers whose blocks are compiled."""
    model = random_pixart(WIDTH, depth, kind, HEAD, SIDE)
    torch.manual_seed(2)
    layers = {}
    for site in block_sites(model):
        columns = model.get_submodule(site.linears[0]).in_features
        smoothing = Smoothing(torch.rand(columns) + 0.5) if is_divided else NO_SMOOTHING
        for name in site.linears:
            weight = quantize_weight(
                model.get_submodule(name).weight.float(), weight_spec(RECIPE, 4))
            layers[name] = QuantizedLayer(
                without_branch(weight), Activation(act_spec(RECIPE, 8)), smoothing)
    install(model, layers, "integer", kind)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True)
    return model


def draw_call(kind: torch.dtype) -> dict:
    """Draw the arguments of a call."""
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(IMAGES, 4, SIDE, SIDE).to(kind),
        "encoder_hidden_states": torch.randn(IMAGES, TEXT, TEXT_WIDTH).to(kind),
        "timestep": torch.full((IMAGES,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@dataclass(frozen=True)
class Pass:
    """What a forward pass took, in seconds."""

    wall: float
    processor: float


def measured(model: nn.Module, call: dict) -> Pass:
    wall, processor = time.perf_counter(), time.process_time()
    model(**call)
    return Pass(time.perf_counter() - wall, time.process_time() - processor)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Print the medians of both ways, and of the ratios of each round."""
    kind = getattr(torch, args.dtype)
    models = {way: quantised(args.depth, kind, way == WAYS[1]) for way in WAYS}
    call = draw_call(kind)
    for model in models.values():
        model(**call)  # compiles
    passes: dict[str, list[Pass]] = {way: [] for way in WAYS}
    for number in tqdm(range(args.rounds), unit="round"):
        for way in WAYS[::1 if number % 2 else -1]:
            passes[way].append(measured(models[way], call))

    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {args.depth} blocks, "
          f"{args.dtype}, {args.rounds} rounds")
    print("| ms per forward pass | no factors | divided | ratio of a round | quartiles |")
    print("|---|---|---|---|---|")
    for clock in ("wall", "processor"):
        plain, divided = ([getattr(taken, clock) for taken in passes[way]] for way in WAYS)
        ratios = [slower / faster for faster, slower in zip(plain, divided)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {clock} | {1000 * statistics.median(plain):.1f} "
              f"| {1000 * statistics.median(divided):.1f} "
              f"| {middle:.3f} | {low:.3f}, {high:.3f} |")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = make_script_parser(__doc__)
    parser.add_argument("--depth", type=int, default=28, help="blocks")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
