"""Draw assets/hero.png: the same emoji from the float model and from four recipes.

    python benchmarks/hero.py                                   # the picture of the README
    python benchmarks/hero.py --bits W4A4 --output W4A4.png     # the same at other bit widths
    python benchmarks/hero.py --model DiT-Digits-Outliers --bits W4A6 --cfg-scale 1.5

Every recipe is quantised by QuantDiT.py with its defaults. Decibels are the SQNR of the latents of
64 images against the float model's with the same noise; the first twelve of them are drawn.
"""
import argparse
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import config
from cards import DiT_models
from diffusion import make_schedule
from diffusion.generate import Sampling
from download import load_decoder, load_model
from evaluation import fidelity
from quant import checkpoint

BUNDLED = [name for name, card in DiT_models.items() if card.is_small]
TITLES = {"rtn": "round to nearest", "ditas": "ditas", "ditas-plus": "ditas-plus",
          "ditas-tuned": "ditas-tuned"}
IMAGES = 64        # behind the decibels
DRAWN = 12         # the first of them, spread over the classes
COLUMNS = 3        # images side by side in a panel
CELL = 128         # pixels of an image; GitHub shows the picture at half its size
SPACE = 12         # pixels between two images
SMOOTH = 32        # images of so many pixels and more are enlarged smoothly
GAP = 56           # pixels between two panels
BAND = 64          # pixels above a panel, and below it


def quantized(model: str, recipe: str, bits: str, folder: Path) -> nn.Module:
    """Quantise a bundled model from the command line, and load the folded result."""
    weight_bits, act_bits = re.fullmatch(r"W(\d+)A(\d+)", bits).groups()
    path = folder / f"{recipe}{checkpoint.SUFFIX}"
    command = [sys.executable, str(ROOT / "QuantDiT.py"), "--model", model, "--recipe", recipe]
    command += ["--weight-bit", weight_bits, "--act-bit", act_bits, "--output", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return checkpoint.load(path, folded=True)[1]


def panel(images: NDArray) -> Image.Image:
    """Enlarge images, uint8 (N, H, W, 3), in rows of ``COLUMNS``."""
    pitch = CELL + SPACE
    rows = -(-len(images) // COLUMNS)
    smooth = images.shape[1] >= SMOOTH
    method = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    canvas = Image.new("RGB", (COLUMNS * pitch + SPACE, rows * pitch + SPACE), "white")
    for i, pixels in enumerate(images):
        row, column = divmod(i, COLUMNS)
        cell = Image.fromarray(pixels).resize((CELL, CELL), method)
        canvas.paste(cell, (SPACE + column * pitch, SPACE + row * pitch))
    return canvas


def draw(panels: list[tuple[str, Image.Image, str]]) -> Image.Image:
    """Panels in a row, each between its title and its caption."""
    _, first, _ = panels[0]
    pitch = first.width + GAP
    canvas = Image.new("RGB", (len(panels) * pitch - GAP, first.height + 2 * BAND), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=36)
    for i, (title, picture, caption) in enumerate(panels):
        left = i * pitch
        middle = left + first.width / 2
        canvas.paste(picture, (left, BAND))
        pen.text((middle, BAND / 2), title, fill="black", anchor="mm", font=font)
        pen.text((middle, first.height + 1.5 * BAND), caption, fill="black", anchor="mm", font=font)
    return canvas


def main(args: argparse.Namespace) -> None:
    card = DiT_models[args.model]
    device = torch.device("cpu")
    schedule = make_schedule("50")
    labels = config.default_labels(card.num_classes, DRAWN)
    labels += [i % card.num_classes for i in range(IMAGES - DRAWN)]
    model = load_model(args.model, card, card.image_sizes[0], card.num_classes, None, device)
    decode = load_decoder(card, "ema", device)

    def sample(model: nn.Module) -> fidelity.Run:
        return fidelity.sample_run(
            model, decode, Sampling(schedule, args.seed, args.cfg_scale), labels, IMAGES)

    # The float model first: the others are measured against it.
    reference = sample(model)
    panels = [("float", panel(reference.images[:DRAWN]), "32 bits")]
    with TemporaryDirectory() as folder:
        for recipe, title in TITLES.items():
            run = sample(quantized(args.model, recipe, args.bits, Path(folder)))
            measured = fidelity.compare_runs(reference, run)
            decibels = measured.sqnr_db[-1]
            panels.append((title, panel(run.images[:DRAWN]), f"{args.bits}: {decibels:.1f} dB"))
            print(f"{recipe}: {decibels:.1f} dB; mean of every image's "
                  f"{measured.image_sqnr_db:.1f} dB", flush=True)

    draw(panels).save(args.output, optimize=True)
    print(f"wrote {args.output}: {args.bits}, guidance {args.cfg_scale:g}, seed {args.seed}, "
          f"{len(schedule)} steps, {IMAGES} images")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BUNDLED, default="DiT-Emoji-Outliers")
    parser.add_argument("--bits", default="W4A8", help="of weights and activations (default: W4A8)")
    parser.add_argument("--cfg-scale", type=float, default=4.0, help="guidance (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the images' noise (default: 0)")
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "hero.png")
    return parser


if __name__ == "__main__":
    with torch.inference_mode():
        main(make_parser().parse_args())
