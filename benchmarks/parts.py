"""What each part of recipe ditas-plus gains, on the outlier twin and layer by layer on a model of DiT-B/2's size.

    python benchmarks/parts.py                    # everything; about an hour on one CPU core
    python benchmarks/parts.py --only twin        # less than ten minutes

twin    SQNR of the outlier twin's latents, for all recipes below
layers  SQNR of every layer's output on held-out inputs, without searches for α but the first row's
search  the same for them, on two of the twelve blocks, because clipping for every candidate takes long
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from architectures.dit import block_linears
from benchmarks.sections import run_sections
from config import RECIPES, Recipe, calibration_cfg_scale
from diffusion import ImageNoise, Schedule, ddpm_step, make_schedule
from diffusion.generate import generate_latents
from download import load_model
from evaluation.metrics import sqnr_db
from examples.digits.outliers import add_outliers
from models import DiT, DiT_models
from quant import evidence
from quant.balancing.candidates import Candidates
from quant.balancing.compiled import FUSED
from quant.calibration.trajectory import record, replay
from quant.install import install
from quant.layers.fold import fold
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.uniform import QuantSpec
from quant.pipeline import Start, quantize_model
from quant.weights.rounding import quantize_weight

IMAGES, SEEDS = 64, (0,)  # of the twin's samples, and of its calibration noise

JOINT = "ditas-plus, α searched jointly with clipping"
DITAS, PLUS = RECIPES["ditas"], RECIPES["ditas-plus"]
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
LEFT_OUT = {
    "ditas-plus without the low-rank branch": replace(PLUS, rank=0),
    "ditas-plus, nearest instead of GPTQ": replace(PLUS, weight="nearest"),
    "ditas-plus without smoothing": replace(PLUS, balance="none"),
    "ditas-plus, a range per image instead of token": replace(PLUS, act_granularity="image"),
    "ditas-plus, adaLN in floating point": replace(PLUS, adaln_bits=16),
    "ditas-plus, floating scales": replace(PLUS, weight_scales="float"),
    "ditas-plus, floating scales, shrunk ranges": replace(PLUS, weight_scales="float", weight_range="shrink"),
}


def start(model: nn.Module, images: int, seed: int) -> Start:
    noise = ImageNoise(seed, range(images), (model.in_channels, model.input_size, model.input_size))
    return Start(noise(), noise, torch.arange(images) % model.num_classes)


def clipped(weight: Tensor, factors: Tensor, spec: QuantSpec) -> Candidates:
    """Each α's weight clipped as is best for it: two-level scales of least error, as they are found after the search elsewhere."""
    values, step = zip(*(quantize_weight(weight * s, spec).integers() for s in factors))
    values = torch.stack(values)
    return Candidates(factors, values.to(torch.int8), torch.stack(step), values.sum(2, dtype=torch.float32))


def quantized(model: nn.Module, label: str, recipe: Recipe, schedule: Schedule, begin: Start) -> dict[str, QuantizedLayer]:
    arithmetic = replace(FUSED, candidates=clipped) if label == JOINT else FUSED
    with patch.object(evidence, "fastest", lambda device, act: arithmetic):
        return quantize_model(model, recipe, 4, 8, schedule, begin).layers


def load_twin() -> DiT:
    return load_model("DiT-Digits-Outliers", DiT_models["DiT-Digits-Outliers"], 16, 10, None, torch.device("cpu"))


@torch.no_grad()
def twin() -> None:
    schedule, model = make_schedule("50"), load_twin()

    def latents(each):
        return generate_latents(each, schedule, range(IMAGES), torch.arange(IMAGES) % 10, 0, calibration_cfg_scale, ddpm_step)
    reference = latents(model)
    print(f"\nDiT-Digits-Outliers (outliers put in by construction), W4A8, {IMAGES} images, 50 steps, means over calibration seeds {SEEDS}")
    print("\n| recipe | SQNR of all latents, dB | mean of every image's, dB |\n|---|---|---|")
    for label, recipe in (BUILT | SEARCHED | LEFT_OUT).items():
        together, single = [], []
        for seed in SEEDS:
            found, fresh = quantized(model, label, recipe, schedule, start(model, 16, seed)), load_twin()
            got = latents(install(fresh, fold(fresh, found)))
            together.append(sqnr_db(reference, got))
            single += [sqnr_db(a, b) for a, b in zip(reference, got)]
        print(f"| {label} | {' / '.join(f'{each:.1f}' for each in together)} | {mean(single):.2f} |", flush=True)


def wide_model(depth: int) -> DiT:
    """DiT-B/2, or some of its blocks, for latents of 16 x 16: random weights, non-zero modulation, outlier channels put in as in the twin."""
    torch.manual_seed(0)
    model = DiT(input_size=16, hidden_size=768, depth=depth, num_heads=12, num_classes=10)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.03)
    model.load_state_dict(add_outliers(model.state_dict(), 1))
    return model.eval()


@torch.no_grad()
def layers(recipes: dict[str, Recipe], depth: int) -> None:
    model, schedule = wide_model(depth), make_schedule("8")
    linears, begin = block_linears(model), start(model, 4, 99)
    held_out, _ = record(model, linears, schedule, begin.labels, calibration_cfg_scale, begin.x, begin.draw)
    print(f"\n{depth} blocks of DiT-B/2, random weights, outliers put in, W4A8: SQNR of each layer's output on the inputs of another trajectory, dB")
    print("\n| recipe | all | qkv | proj | fc1 | fc2 |\n|---|---|---|---|---|---|")
    for label, recipe in recipes.items():
        found = quantized(model, label, recipe, schedule, start(model, 4, 0))
        energies = {name: torch.zeros(2, dtype=torch.float64) for name in linears}

        def observer(name, found=found, energies=energies):
            layer = QuantLinear(found[name], None)

            def see(x, y):
                product = y - linears[name].bias
                error = layer(x.flatten(0, 1)).view_as(y) - product
                energies[name] += torch.stack([product.square().sum(dtype=torch.float64), error.square().sum(dtype=torch.float64)])
            return see
        replay(model, linears, held_out, {name: [observer(name)] for name in linears}, 4096, "held out")
        decibels = {name: float(10 * torch.log10(signal / noise)) for name, (signal, noise) in energies.items()}
        kinds = [mean(value for name, value in decibels.items() if name.endswith(kind)) for kind in ("", "qkv", "proj", "fc1", "fc2")]
        print(f"| {label} | {' | '.join(f'{each:.2f}' for each in kinds)} |", flush=True)


if __name__ == "__main__":
    run_sections(__doc__, {"twin": twin, "layers": partial(layers, BUILT | LEFT_OUT, 12), "search": partial(layers, {"ditas-plus": PLUS} | SEARCHED, 2)})
