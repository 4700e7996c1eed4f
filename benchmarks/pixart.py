"""Quantise PixArt-Emoji from the command line, and compare latents with the float pipeline's.

    python benchmarks/pixart.py                 # a table, and results/pixart-W4A8.png
    python benchmarks/pixart.py --bits W4A4

Every row is a folder that QuantDiT.py wrote and diffusers loaded. Calibration has the names of 33
emoji; the images are those of ``examples.emoji.prompts``, whose noise it did not see.
"""
import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

# Lets diffusers know the quantisation.
import ditas  # noqa: F401
from cli.parser import make_script_parser, run
from evaluation.metrics import sqnr_db
from examples.emoji.data import drawn_emoji
from examples.emoji.pixart import FOLDER, load_pipeline
from examples.emoji.prompts import NAMES, NEW, figure
from files.images import to_bytes
from report.canvas import png

RECIPES = ("rtn", "smoothquant", "ditas", "ditas-plus")
EVERY = 14  # of the emoji: a name to calibrate on
STEPS = 25
SCRIPT = ROOT / "QuantDiT.py"


def quantise(recipe: str, bits: str, prompts: Path, output: Path) -> float:
    """Write the quantised pipeline's folder; returns the seconds of the whole command."""
    weight_bits, act_bits = re.fullmatch(r"W(\d+)A(\d+)", bits).groups()
    command = [
        sys.executable, SCRIPT, "--model", FOLDER, "--recipe", recipe, "--weight-bit", weight_bits,
        "--act-bit", act_bits, "--prompts", prompts, "--num-sampling-steps", STEPS,
        "--pipeline-args", '{"use_resolution_binning": false, "clean_caption": false}',
        "--output", output]
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return time.perf_counter() - start


@torch.no_grad()
def sample(pipeline: DiffusionPipeline) -> tuple[Tensor, np.ndarray]:
    """Draw all prompts: latents (N, 4, 16, 16) and images (N, 64, 64, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = [*NAMES, *NEW]
    latents = pipeline(
        prompts, num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(place) for place in range(len(prompts))],
        output_type="latent", use_resolution_binning=False, clean_caption=False).images
    vae = pipeline.vae
    decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return latents, to_bytes(decoded)


def main(args: argparse.Namespace) -> None:
    reference, images = sample(load_pipeline())
    rows = [images[:len(NAMES)]]
    print("| recipe | s | MB | SQNR, dB |\n|---|---|---|---|")
    with TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("\n".join(drawn_emoji().names[::EVERY].tolist()))
        for recipe in RECIPES:
            output = Path(folder, recipe)
            seconds = quantise(recipe, args.bits, prompts, output)
            latents, images = sample(DiffusionPipeline.from_pretrained(output))
            weights = output / "transformer" / "diffusion_pytorch_model.safetensors"
            print(f"| `{recipe}` | {seconds:.0f} | {weights.stat().st_size / 1e6:.1f} "
                  f"| {sqnr_db(reference, latents):.1f} |", flush=True)
            rows.append(images[:len(NAMES)])
    path = Path(f"results/pixart-{args.bits}.png")
    path.parent.mkdir(exist_ok=True)
    titles = [f"{title}: {name}" for title in ("float", *RECIPES) for name in NAMES]
    path.write_bytes(png(figure(np.concatenate(rows), titles)))
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = make_script_parser(__doc__)
    parser.add_argument("--bits", default="W4A8")
    run(main, parser)
