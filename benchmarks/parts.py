"""What each part of recipe ditas-plus gains, on the outlier twin and layer by layer on a DiT of width 768.

    python benchmarks/parts.py                    # both tables; about 20 minutes on two CPU cores
    python benchmarks/parts.py --only layers      # a few minutes
"""
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks.sections import run_sections
from config import RECIPES, calibration_cfg_scale
from diffusion import ImageNoise, ddpm_step, make_schedule
from diffusion.generate import generate_latents
from download import load_model
from examples.digits.outliers import add_outliers
from metrics import sqnr_db
from models import DiT, DiT_models
from quant.backend import install
from quant.calibrate import record, replay
from quant.linear import QuantLinear, block_linears
from quant.merge import fold
from quant.pipeline import Start, quantize_model

IMAGES, SEEDS = 64, (0,)  # of the twin's samples, and of its calibration noise

DITAS, PLUS = RECIPES["ditas"], RECIPES["ditas-plus"]
BUILT = {
    "ditas": DITAS,
    "+ GPTQ inside the alternation": replace(DITAS, weight="gptq"),
    "+ low rank fitted to the output": replace(DITAS, weight="gptq", metric="output"),
    "+ groups of 32": replace(PLUS, alphas=DITAS.alphas),
    "- search for α, which is 0.5: ditas-plus": PLUS,
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
    for label, recipe in (BUILT | LEFT_OUT).items():
        together, single = [], []
        for seed in SEEDS:
            result, fresh = quantize_model(model, recipe, 4, 8, schedule, start(model, 16, seed)), load_twin()
            got = latents(install(fresh, fold(fresh, result.layers)))
            together.append(sqnr_db(reference, got))
            single += [sqnr_db(a, b) for a, b in zip(reference, got)]
        print(f"| {label} | {' / '.join(f'{each:.1f}' for each in together)} | {mean(single):.2f} |", flush=True)


def wide_model() -> DiT:
    """Two blocks of DiT-B/2's shape, random weights, non-zero modulation, outlier channels put in as in the twin."""
    torch.manual_seed(0)
    model = DiT(input_size=16, hidden_size=768, depth=2, num_heads=12, num_classes=10)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.03)
    model.load_state_dict(add_outliers(model.state_dict(), 1))
    return model.eval()


@torch.no_grad()
def layers() -> None:
    model, schedule = wide_model(), make_schedule("8")
    linears, begin = block_linears(model), start(model, 4, 99)
    held_out, _ = record(model, linears, schedule, begin.labels, calibration_cfg_scale, begin.x, begin.draw)
    print("\nTwo blocks of width 768, random weights, outliers put in, W4A8: SQNR of each layer's output on the inputs of another trajectory, dB")
    print("\n| recipe | all | qkv | proj | fc1 | fc2 |\n|---|---|---|---|---|---|")
    for label, recipe in (BUILT | LEFT_OUT).items():
        found = quantize_model(model, recipe, 4, 8, schedule, start(model, 4, 0)).layers
        energies = {name: torch.zeros(2, dtype=torch.float64) for name in linears}

        def observer(name, found=found, energies=energies):
            quantised = QuantLinear(found[name], None)

            def see(x, y):
                energies[name] += torch.stack([y.square().sum(dtype=torch.float64), (quantised(x.flatten(0, 1)).view_as(y) - y).square().sum(dtype=torch.float64)])
            return see
        replay(model, linears, held_out, {name: [observer(name)] for name in linears}, 4096, "held out")
        decibels = {name: float(10 * torch.log10(signal / noise)) for name, (signal, noise) in energies.items()}
        kinds = [mean(value for name, value in decibels.items() if name.endswith(kind)) for kind in ("", "qkv", "proj", "fc1", "fc2")]
        print(f"| {label} | {' | '.join(f'{each:.2f}' for each in kinds)} |", flush=True)


if __name__ == "__main__":
    run_sections(__doc__, {"twin": twin, "layers": layers})
