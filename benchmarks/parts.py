"""What each part of recipe ditas-plus gains.

    python benchmarks/parts.py                    # everything; about an hour on one CPU core
    python benchmarks/parts.py --only twin        # less than ten minutes

twin    SQNR of the outlier twin's latents, for all recipes below
layers  SQNR of every layer's output on held-out inputs, on a model of DiT-B/2's size, without
        searches for α but the first row's
search  the same for the searches, on two of the twelve blocks, because clipping for every candidate
        takes long
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import torch
from torch import Tensor, nn

from benchmarks.sections import run_sections
from benchmarks.subjects import (
    Start,
    block_sites,
    calibration_start,
    load_bundled,
    output_sqnr,
    randomise,
)
from config import RECIPES, Recipe, calibration_cfg_scale
from diffusion import Schedule, ddpm_step, make_schedule
from diffusion.generate import generate_latents
from evaluation.metrics import sqnr_db
from examples.digits.outliers import add_outliers
from models import DiT
from quant import parts
from quant.balancing.candidates import Candidates
from quant.balancing.compiled import FUSED
from quant.calibration.trajectory import record
from quant.install import install
from quant.layers.fold import fold
from quant.layers.quantised import QuantizedLayer
from quant.numerics.spec import QuantSpec
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from quant.weights.rounding import quantize_weight

IMAGES = 64  # of the twin's samples
SEEDS = (0,)  # of its calibration noise
ROLES = ("qkv", "proj", "fc1", "fc2")

JOINT = "ditas-plus, α searched jointly with clipping"
DITAS = RECIPES["ditas"]
PLUS = RECIPES["ditas-plus"]
HALF = replace(DITAS, alphas=PLUS.alphas)
BUILT = {
    "ditas": DITAS,
    "- search for α, which is 0.5": HALF,
    "+ GPTQ inside the alternation": replace(HALF, weight="gptq"),
    "+ low rank fitted to the output": replace(HALF, weight="gptq", metric="output"),
    "+ groups of 32: ditas-plus": PLUS,
}
SEARCHED = {
    "ditas-plus, α searched": replace(PLUS, alphas=DITAS.alphas),
    JOINT: replace(PLUS, alphas=DITAS.alphas),
}
FLOATING = replace(PLUS, weight_scales="float")
LEFT_OUT = {
    "ditas-plus without the low-rank branch": replace(PLUS, rank=0),
    "ditas-plus, nearest instead of GPTQ": replace(PLUS, weight="nearest"),
    "ditas-plus without smoothing": replace(PLUS, balance="none"),
    "ditas-plus, a range per image instead of token": replace(PLUS, act_granularity="image"),
    "ditas-plus, adaLN in floating point": replace(PLUS, adaln_bits=16),
    "ditas-plus, floating scales": FLOATING,
    "ditas-plus, floating scales, shrunk ranges": replace(FLOATING, weight_range="shrink"),
}


def clipped(weight: Tensor, factors: Tensor, spec: QuantSpec) -> Candidates:
    """Clip each α's weight as is best for it: two-level scales of least error.

    Elsewhere these are found after the search.
    """
    rounded = [quantize_weight(weight * s, spec).integers() for s in factors]
    values = torch.stack([candidate[0] for candidate in rounded])
    step = torch.stack([candidate[1] for candidate in rounded])
    sums = values.sum(2, dtype=torch.float32)
    return Candidates(factors, values.to(torch.int8), step, sums)


def quantise(
    model: nn.Module,
    label: str,
    recipe: Recipe,
    schedule: Schedule,
    start: Start,
) -> dict[str, QuantizedLayer]:
    """Quantise at W4A8; row ``JOINT`` searches among clipped candidates."""
    arithmetic = replace(FUSED, candidates=clipped) if label == JOINT else FUSED
    with patch.object(parts, "fastest", lambda device, act: arithmetic):
        return quantize_model(model, recipe, BitWidths(4, 8), start.drive(schedule)).layers


@torch.no_grad()
def twin() -> None:
    schedule = make_schedule("50")
    model = load_bundled("DiT-Digits-Outliers")
    reference = twin_latents(model, schedule)
    print("\nDiT-Digits-Outliers (outliers put in by construction), W4A8, "
          f"{IMAGES} images, 50 steps, means over calibration seeds {SEEDS}")
    print("\n| recipe | SQNR of all latents, dB | mean of every image's, dB |")
    print("|---|---|---|")
    for label, recipe in (BUILT | SEARCHED | LEFT_OUT).items():
        together = []
        single = []
        for seed in SEEDS:
            start = calibration_start(model, 16, seed)
            layers = quantise(model, label, recipe, schedule, start)
            fresh = load_bundled("DiT-Digits-Outliers")
            latents = twin_latents(install(fresh, fold(fresh, layers)), schedule)
            together.append(sqnr_db(reference, latents))
            single += [sqnr_db(a, b) for a, b in zip(reference, latents)]
        decibels = " / ".join(f"{value:.1f}" for value in together)
        print(f"| {label} | {decibels} | {mean(single):.2f} |", flush=True)


def twin_latents(model: nn.Module, schedule: Schedule) -> Tensor:
    """Sample the images that the table compares, (N, C, H, W)."""
    labels = torch.arange(IMAGES) % 10
    scale = calibration_cfg_scale
    return generate_latents(model, schedule, range(IMAGES), labels, 0, scale, ddpm_step)


def wide_model(depth: int) -> DiT:
    """Build DiT-B/2, or some of its blocks, for latents of 16 x 16.

    Weights are random, modulation is not zero, and outlier channels are put in as in the twin.
    """
    torch.manual_seed(0)
    model = DiT(input_size=16, hidden_size=768, depth=depth, num_heads=12, num_classes=10)
    randomise(model, std=0.03)
    model.load_state_dict(add_outliers(model.state_dict(), 1))
    return model.eval()


@torch.no_grad()
def layers(recipes: dict[str, Recipe], depth: int) -> None:
    model = wide_model(depth)
    schedule = make_schedule("8")
    drive = calibration_start(model, 4, 99).drive(schedule)
    held_out, _ = record(model, block_sites(model), drive)
    print(f"\n{depth} blocks of DiT-B/2, random weights, outliers put in, W4A8: "
          "SQNR of each layer's output on the inputs of another trajectory, dB")
    print(f"\n| recipe | all | {' | '.join(ROLES)} |")
    print("|---|---|---|---|---|---|")
    for label, recipe in recipes.items():
        quantised = quantise(model, label, recipe, schedule, calibration_start(model, 4, 0))
        decibels = output_sqnr(model, quantised, held_out, 4096)
        means = [mean(decibels.values())]
        for role in ROLES:
            means.append(mean(value for name, value in decibels.items() if name.endswith(role)))
        cells = " | ".join(f"{value:.2f}" for value in means)
        print(f"| {label} | {cells} |", flush=True)


if __name__ == "__main__":
    run_sections(__doc__, {
        "twin": twin,
        "layers": partial(layers, BUILT | LEFT_OUT, 12),
        "search": partial(layers, {"ditas-plus": PLUS} | SEARCHED, 2),
    })
