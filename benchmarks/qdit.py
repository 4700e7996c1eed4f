"""What Q-DiT's choices cost: those that paper and code make differently, and the sizes of groups.

    python benchmarks/qdit.py                  # everything
    python benchmarks/qdit.py --only choices

choices  zero points, Hessians, adaLN's inputs and the scope, with groups of 64 everywhere
groups   one group size for all layers (table 1)
search   how a size per layer is found, all under one constraint and one judge (table 6)
floating weights of 16 bits: what activations alone cost (table 5)
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import torch
from torch import Tensor

from benchmarks.sections import run_sections
from benchmarks.subjects import calibration_start, load_bundled
from config import RECIPES, Recipe, calibration_cfg_scale
from diffusion import ddpm_step, make_schedule
from diffusion.generate import Sampling, generate_latents
from evaluation.judge import sqnr_judge
from evaluation.metrics import sqnr_db
from models import DiT
from quant.install import install
from quant.layers.fold import fold
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from quant.refinement.allocation import GroupSearch
from quant.refinement.group_sizes import mean_group_size

MODEL = "DiT-Digits-Outliers"
STEPS = 20
CALIBRATED = 16  # images
IMAGES = 32  # that are compared

QDIT = RECIPES["qdit"]
FIXED = replace(QDIT, group_sizes=(), weight_group=64)
CHOICES = {
    "qdit, groups of 64": FIXED,
    "zero-point=clamped (code)": replace(FIXED, convention="clamped"),
    "zero-point=widened (ours)": replace(FIXED, convention="affine"),
    "hessian=float": replace(FIXED, hessian="float"),
    "adaln-input=quantised": replace(FIXED, adaln_input="quantised"),
    "scope=adaln": replace(FIXED, scope="adaln"),
    "scope=adaln,zero-point=clamped": replace(FIXED, scope="adaln", convention="clamped"),
    "weight=nearest": replace(FIXED, weight="nearest"),
    "weight=nearest,zero-point=clamped": replace(FIXED, weight="nearest", convention="clamped"),
    "weight=nearest,zero-point=widened": replace(FIXED, weight="nearest", convention="affine"),
}
GROUPS = {
    f"group-size={size}": replace(FIXED, weight_group=size, group_tail="allow")
    for size in (288, 128, 96, 64, 32)
}
SEARCHED = {
    "group-size=128 (no search)": replace(FIXED, weight_group=128),
    "allocate=ilp": replace(QDIT, allocate="ilp"),
    "allocate=hessian": replace(QDIT, allocate="hessian"),
    "allocate=evolution, 4 rounds of 10": replace(QDIT, population=10, generations=4),
}
FLOATING = {
    "tfmq-dm": RECIPES["tfmq-dm"],
    "qdit, groups of 128": replace(FIXED, weight_group=128),
    "rtn, scope=all": replace(RECIPES["rtn"], scope="all"),
}


@torch.no_grad()
def compare(recipes: dict[str, Recipe], bits: BitWidths) -> None:
    """Print how far latents are from the float model's, for several recipes."""
    model = load_bundled(MODEL)
    reference = latents(model)
    print(f"\n{MODEL} (outliers put in by construction), W{bits.weights}A{bits.activations}, "
          f"{IMAGES} images, {STEPS} steps")
    print("\n| recipe | SQNR of all latents, dB | mean of every image's, dB "
          "| mean size | judge, dB | search s |")
    print("|---|---|---|---|---|---|")
    for label, recipe in recipes.items():
        result = quantise(model, recipe, bits)
        fresh = load_bundled(MODEL)
        layers = fold(fresh, result.layers)
        operands = {name: quantisers.fold() for name, quantisers in result.operands.items()}
        quantised = latents(install(fresh, layers, operands=operands))
        together = sqnr_db(reference, quantised)
        single = mean(sqnr_db(a, b) for a, b in zip(reference, quantised))
        print(f"| {label} | {together:.1f} | {single:.2f} | {searched(result)} |", flush=True)


def quantise(model: DiT, recipe: Recipe, bits: BitWidths) -> Result:
    schedule = make_schedule(str(STEPS))
    drive = calibration_start(model, CALIBRATED).drive(schedule)
    sampling = Sampling(schedule, 0, recipe.judge_cfg_scale, recipe.judge_sampler)
    search = GroupSearch(sqnr_judge(model, sampling))
    return quantize_model(model, recipe, bits, drive, search=search)


def searched(result: Result) -> str:
    """Write what a search found, in three cells."""
    if result.allocation is None:
        return "- | - | -"
    found = result.allocation
    return f"{mean_group_size(found.groups):.1f} | {-found.loss:.1f} | {found.seconds:.1f}"


def latents(model: DiT) -> Tensor:
    """Sample the images that the table compares, (N, C, H, W)."""
    labels = torch.arange(IMAGES) % 10
    schedule = make_schedule(str(STEPS))
    return generate_latents(
        model, schedule, range(IMAGES), labels, 0, calibration_cfg_scale, ddpm_step)


if __name__ == "__main__":
    run_sections(__doc__, {
        "choices": partial(compare, CHOICES, BitWidths(4, 8)),
        "groups": partial(compare, GROUPS, BitWidths(4, 8)),
        "search": partial(compare, SEARCHED, BitWidths(4, 8)),
        "floating": partial(compare, FLOATING, BitWidths(16, 8)),
    })
