"""Draw guided samples, and print how often the probe reads the category that was asked for.

    python -m examples.emoji.gallery                               # of DiT-Emoji
    python -m examples.emoji.gallery --model DiT-Emoji-Outliers

The picture holds a sample of every class: ``results/emoji/DiT-Emoji.png``.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from cards import DiT_models
from cli.parser import make_script_parser, run
from diffusion import ddpm_step, make_schedule
from diffusion.generate import decode_images, generate_latents
from download import load_decoder, load_model
from examples.emoji.data import IMAGE_SIZE, class_categories
from examples.emoji.probe import CATEGORIES, load_probe
from files.images import grid

CPU = torch.device("cpu")
COLUMNS = 8


def draw(name: str, count: int, steps: int, cfg_scale: float) -> tuple[np.ndarray, torch.Tensor]:
    """Sample ``count`` images (N, 64, 64, 3) of the classes in turn; returns them and labels."""
    card = DiT_models[name]
    model = load_model(name, card, IMAGE_SIZE, card.num_classes, None, CPU)
    decoder = load_decoder(card, "ema", CPU)
    labels = torch.arange(count) % card.num_classes
    latents = generate_latents(
        model, make_schedule(str(steps)), range(count), labels, 0, cfg_scale, ddpm_step)
    return decode_images(decoder, latents, 32), labels


def share_right(images: np.ndarray, labels: torch.Tensor) -> float:
    """Compute the share of images (N, 64, 64, 3) that show the category of their label (N,)."""
    wanted = [CATEGORIES.index(name) for name in class_categories()]
    read = load_probe(CPU)(images)
    return float((read == torch.tensor(wanted)[labels]).float().mean())


def main(args: argparse.Namespace) -> None:
    images, labels = draw(args.model, args.count, args.steps, args.cfg_scale)
    path = args.out / f"{args.model}.png"
    args.out.mkdir(parents=True, exist_ok=True)
    grid(images[:DiT_models[args.model].num_classes], COLUMNS, 128).save(path)
    print(f"wrote {path}")
    print(f"{share_right(images, labels):.1%} of {args.count} samples show the category asked for")


if __name__ == "__main__":
    parser = make_script_parser(__doc__)
    parser.add_argument("--model", choices=("DiT-Emoji", "DiT-Emoji-Outliers"), default="DiT-Emoji")
    parser.add_argument("--count", type=int, default=310)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("results/emoji"))
    run(main, parser)
