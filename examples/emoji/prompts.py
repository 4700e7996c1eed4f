"""Draw PixArt-Emoji's answers to names it learned, and to prompts that name no emoji.

    python -m examples.emoji.prompts                            # assets/prompts.png
    python -m examples.emoji.prompts "blue apple" "green cat"   # results/emoji/prompts.png

Images come out as they come: one seed, nothing picked.
"""
import argparse
import textwrap
from pathlib import Path

import numpy as np

from cli.parser import Parser, make_script_parser, run
from examples.emoji.pixart import draw_prompts, load_pipeline
from files.atomic import atomic
from report.canvas import Canvas, png

SHOWN = Path("assets/prompts.png")
ASKED = Path("results/emoji/prompts.png")
NAMES = (
    "grinning face with smiling eyes", "smiling cat face with heart-shaped eyes", "skull",
    "green heart", "frog face", "panda face", "red apple", "slice of pizza")
# Chosen before any of them was drawn; every word is one of some name's.
NEW = (
    "blue apple", "green cat", "purple frog face", "cat face with sunglasses",
    "pink pizza", "crying panda", "angry fish", "apple with heart-shaped eyes")
COLUMNS = 8
WIDTH = 18  # characters of a line above an image


def figure(images: np.ndarray, prompts: list[str]) -> Canvas:
    """Arrange images (N, H, W, 3) in rows, each under its prompt."""
    columns = min(COLUMNS, len(prompts))
    rows = -(-len(prompts) // columns)
    canvas = Canvas(figsize=(1.6 * columns, 2.2 * rows), layout="constrained")
    canvas.get_layout_engine().set(h_pad=0.1)
    places = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axes in places:
        axes.axis("off")
    for axes, image, prompt in zip(places, images, prompts):
        axes.imshow(image, interpolation="lanczos")
        axes.set_title("\n".join(textwrap.wrap(prompt, WIDTH)), fontsize=9)
    return canvas


def main(args: argparse.Namespace) -> None:
    prompts = args.prompts or [*NAMES, *NEW]
    path = args.out or (ASKED if args.prompts else SHOWN)
    images = draw_prompts(load_pipeline(), prompts, args.seed, args.steps, args.guidance_scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_bytes(png(figure(images, prompts)))
    print(f"wrote {path}")


def make_parser() -> Parser:
    """Make the parser of the command line."""
    parser = make_script_parser(__doc__)
    parser.add_argument("prompts", nargs="*", help="what to draw; none: what the docs show")
    parser.add_argument("--seed", type=int, default=0, help="of the first image's noise")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.5)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    run(main, make_parser())
