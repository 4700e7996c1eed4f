"""Which steps of DiTAS earn their place.

    python benchmarks/steps.py                    # both twins, W4A8; --only emoji or digits for one

A finished image is a poor judge of a small step: whichever way the sampler goes on a few images
decides. So all recipes see the float model's own inputs here, on noise that no calibration saw.

layers    SQNR of the output of a layer, in dB, mean of all layers
one pass  SQNR of the model's output, in dB, over all timesteps together

Two rows have no loss of their own. All of ``ditas``, the branch too, is done at every α. In row
``JOINT`` each layer takes what is best for its output: no search of α can find less error on these
inputs. In row ``BY_OUTPUT`` one layer after the other takes what is best for the model's output.
"""
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import torch
from torch import Tensor, nn

from benchmarks.sections import run_sections
from benchmarks.subjects import (
    block_linears,
    block_sites,
    calibration_start,
    load_bundled,
    output_sqnr,
)
from config import RECIPES, Recipe
from diffusion import make_schedule
from evaluation.metrics import sqnr_db
from models import DiT
from quant.calibration.trajectory import Drive, Trajectory, record
from quant.install import install
from quant.layers.fold import fold
from quant.layers.quantised import QuantizedLayer
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from quant.refinement.tuning import draw, loss_of

STEPS = 25
IMAGES = 16
HELD_OUT_SEED = 1000

DITAS = RECIPES["ditas"]
PLUS = RECIPES["ditas-plus"]
WIDE = 32
JOINT = "`ditas`, α searched with the branch in it"
BY_OUTPUT = "`ditas`, α searched by the model's output"
TRIED = tuple(0.1 * i for i in range(11))  # α of these rows
JUDGE_BATCHES = 4  # batches of 32 images, by which one α is judged
RECIPES_BY_ROW = {
    "`rtn` on the layout of `ditas`": replace(DITAS, balance="none", rank=0),
    "+ smoothing, α = 0.5": replace(DITAS, alphas=(0.5,), rank=0),
    "+ α searched": replace(DITAS, rank=0),
    "+ branch: `ditas`": DITAS,
    JOINT: DITAS,
    BY_OUTPUT: DITAS,
    "`ditas`, α = 0.5": replace(DITAS, alphas=(0.5,)),
    "`ditas`, branch fitted to outputs": replace(DITAS, metric="output"),
    f"`ditas`, rank {WIDE}": replace(DITAS, rank=WIDE),
    f"`ditas`, rank {WIDE}, fitted to outputs": replace(DITAS, rank=WIDE, metric="output"),
    "`ditas` with GPTQ": replace(DITAS, weight="gptq"),
    "`ditas-plus`": PLUS,
    "`ditas-plus`, α searched": replace(PLUS, alphas=DITAS.alphas),
    "`ditas-plus` without the branch": replace(PLUS, rank=0),
    "`ditas-tuned`": RECIPES["ditas-tuned"],
}

Layers = dict[str, QuantizedLayer]


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[tuple]]:
    """Keep the arguments and the output of every call of the model, while open."""
    calls = []

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        calls.append((tuple(value.clone() for value in arguments), output.clone()))

    handle = model.register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


def drive_from(model: DiT, seed: int = 0, images: int = IMAGES) -> Drive:
    """Make a drive that samples a few images, from noise by the seed."""
    return calibration_start(model, images, seed).drive(make_schedule(str(STEPS)))


def quantise(model: DiT, recipe: Recipe) -> Layers:
    drive = drive_from(model, images=recipe.images or IMAGES)
    return quantize_model(model, recipe, BitWidths(4, 8), drive).layers


def without_search(model: DiT, recipe: Recipe, trajectory: Trajectory) -> Layers:
    """Quantise as the recipe says; its own trajectory is the same."""
    return quantise(model, recipe)


def at_every_alpha(model: DiT, recipe: Recipe) -> list[Layers]:
    """Quantise all layers at one α after the other."""
    return [quantise(model, replace(recipe, alphas=(alpha,))) for alpha in TRIED]


def best_of_each(model: DiT, recipe: Recipe, trajectory: Trajectory) -> Layers:
    """Quantise at every α, and take each layer where its output's error is least."""
    runs = at_every_alpha(model, recipe)
    found = [output_sqnr(model, layers, trajectory) for layers in runs]
    best = {name: max(range(len(runs)), key=lambda i: found[i][name]) for name in found[0]}
    # The modulation is the same in all runs.
    return runs[0] | {name: runs[i][name] for name, i in best.items()}


def best_for_the_model(model: DiT, recipe: Recipe, trajectory: Trajectory) -> Layers:
    """Quantise at every α; from α = 0.5 on, let each layer in turn take what the model gains by."""
    runs = at_every_alpha(model, recipe)
    generator = torch.Generator().manual_seed(0)
    judges = [trajectory.take(draw(trajectory, generator)) for _ in range(JUDGE_BATCHES)]
    chosen = dict(runs[TRIED.index(0.5)])
    for name in block_linears(model):
        choices = [chosen | {name: run[name]} for run in runs]
        chosen = min(choices, key=lambda layers: loss_of(model, layers, judges))
    return chosen


SEARCHES = {JOINT: best_of_each, BY_OUTPUT: best_for_the_model}


def one_pass_sqnr(name: str, layers: Layers, calls: list[tuple]) -> float:
    """Measure the SQNR in dB of the quantised model's output, given the float model's inputs."""
    fresh = load_bundled(name)
    quantised = install(fresh, fold(fresh, layers))
    outputs = torch.cat([quantised(*arguments) for arguments, _ in calls])
    return sqnr_db(torch.cat([output for _, output in calls]), outputs)


@torch.no_grad()
def compare(name: str) -> None:
    """Print the table of one model."""
    model = load_bundled(name)
    with calls_of(model) as calls:
        held_out, _ = record(model, block_sites(model), drive_from(model, HELD_OUT_SEED))
    calibrated, _ = record(model, block_sites(model), drive_from(model))
    print(f"\n{name} (outliers put in by construction), W4A8, {STEPS} steps")
    print("\n| recipe | layers, calibrated on | layers, held out | one pass, held out |")
    print("|---|---|---|---|")
    for label, recipe in RECIPES_BY_ROW.items():
        search = SEARCHES.get(label, without_search)
        layers = search(model, recipe, calibrated)
        cells = [
            mean(output_sqnr(model, layers, calibrated).values()),
            mean(output_sqnr(model, layers, held_out).values()),
            one_pass_sqnr(name, layers, calls),
        ]
        print(f"| {label} | {' | '.join(f'{value:.2f}' for value in cells)} |", flush=True)


if __name__ == "__main__":
    run_sections(__doc__, {
        "emoji": partial(compare, "DiT-Emoji-Outliers"),
        "digits": partial(compare, "DiT-Digits-Outliers"),
    })
