"""Which category does an image show? A linear layer on EfficientNet-Lite0's features.

    python -m examples.emoji.probe    # fit it again, and print how often it is right

It is fitted to the 1906 real emoji of nine categories and their mirror images.
"""
import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from cli.parser import make_script_parser, run
from evaluation.efficientnet import load_efficientnet
from evaluation.features import extract
from examples.emoji.data import Emoji, load_emoji
from files.atomic import atomic

WEIGHTS = Path(__file__).with_name("probe.safetensors")
CATEGORIES = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places",
    "Activities", "Objects", "Symbols", "Flags",
)
DECAY = 1e-3  # of squared weights
FOLDS = 5


def probed_emoji() -> tuple[Emoji, Tensor]:
    """Load the emoji of the nine categories, and the number (N,) of each one's category."""
    emoji = load_emoji()
    # The skin tones' five swatches are left out.
    emoji = emoji.pick(np.isin(emoji.categories, CATEGORIES))
    numbers = [CATEGORIES.index(name) for name in emoji.categories.tolist()]
    return emoji, torch.tensor(numbers)


def fit(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a softmax regression to features (N, D) by L-BFGS; returns weight (K, D), bias (K,)."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    x = (features - mean) / deviation
    weight = torch.zeros(len(CATEGORIES), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(CATEGORIES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, labels) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scaled = weight.detach() / deviation
    return scaled, bias.detach() - scaled @ mean


def load_probe(device: torch.device) -> Callable[[np.ndarray], Tensor]:
    """Load the bundled probe: uint8 images (N, H, W, 3) to numbers (N,) of ``CATEGORIES``.

    Raises:
        UserError: EfficientNet's package is missing.
    """
    extractor = load_efficientnet(device)
    state = load_file(WEIGHTS)

    def categories_of(images: np.ndarray) -> Tensor:
        pool = torch.from_numpy(extract(images, extractor, 64, "features")["pool"])
        return (pool @ state["weight"].T + state["bias"]).argmax(1)

    return categories_of


def held_out_accuracy(features: Tensor, labels: Tensor) -> float:
    """Fit on four fifths of the features (N, D), read the rest, five times; the share right."""
    right = 0
    for fold in range(FOLDS):
        held_out = torch.arange(len(labels)) % FOLDS == fold
        weight, bias = fit(features[~held_out], labels[~held_out])
        read = (features[held_out] @ weight.T + bias).argmax(1)
        right += int((read == labels[held_out]).sum())
    return right / len(labels)


def main(_: argparse.Namespace) -> None:
    extractor = load_efficientnet(torch.device("cpu"))
    emoji, labels = probed_emoji()
    sides = [emoji.images, emoji.images[:, :, ::-1]]
    features = [torch.from_numpy(extract(side, extractor, 64, "emoji")["pool"]) for side in sides]
    print(f"held-out emoji read right: {held_out_accuracy(features[0], labels):.1%}")
    weight, bias = fit(torch.cat(features), torch.cat([labels, labels]))
    with atomic(WEIGHTS) as temporary:
        save_file({"weight": weight, "bias": bias}, temporary)
    print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    run(main, make_script_parser(__doc__))
