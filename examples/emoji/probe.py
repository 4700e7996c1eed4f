"""Which category does an image show? A linear layer on EfficientNet-Lite0's features.

    python -m examples.emoji.probe    # fit it again, and print how often it is right

It is fitted to the 1906 real emoji of nine categories, their mirror images, and what the VAE makes
of them, which is what a perfect DiT would draw: fitted to real ones alone it reads 72 % of the
reconstructions of emoji that it was fitted to.
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
from examples.emoji.autoencoder import encode, load_autoencoder
from examples.emoji.data import Emoji, load_emoji, to_tensor
from files.atomic import atomic
from files.images import to_bytes

WEIGHTS = Path(__file__).with_name("probe.safetensors")
CATEGORIES = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places",
    "Activities", "Objects", "Symbols", "Flags",
)
DECAY = 1e-3  # of squared weights
FOLDS = 5
BATCH = 64


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
        pool = torch.from_numpy(extract(images, extractor, BATCH, "features")["pool"])
        return (pool @ state["weight"].T + state["bias"]).argmax(1)

    return categories_of


def held_out_accuracy(features: dict[str, Tensor], labels: Tensor, read: str) -> float:
    """Fit on all versions of four fifths of the emoji, read one of the rest; the share right.

    Args:
        features: by version, (N, D) each.
        labels: (N,).
        read: the version that is read.
    """
    right = 0
    for fold in range(FOLDS):
        held_out = torch.arange(len(labels)) % FOLDS == fold
        kept = torch.cat([version[~held_out] for version in features.values()])
        weight, bias = fit(kept, labels[~held_out].repeat(len(features)))
        guess = (features[read][held_out] @ weight.T + bias).argmax(1)
        right += int((guess == labels[held_out]).sum())
    return right / len(labels)


@torch.inference_mode()
def reconstructed(images: np.ndarray) -> np.ndarray:
    """Send uint8 images (N, H, W, 3) through the VAE."""
    vae = load_autoencoder()
    return np.concatenate([
        to_bytes(vae.decode(encode(vae, to_tensor(part))).sample)
        for part in np.array_split(images, -(-len(images) // BATCH))
    ])


def main(_: argparse.Namespace) -> None:
    extractor = load_efficientnet(torch.device("cpu"))
    emoji, labels = probed_emoji()
    versions = {
        "real": emoji.images,
        "mirrored": emoji.images[:, :, ::-1],
        "reconstructed": reconstructed(emoji.images),
    }
    features = {
        name: torch.from_numpy(extract(images, extractor, BATCH, name)["pool"])
        for name, images in versions.items()
    }
    for name in features:
        share = held_out_accuracy(features, labels, name)
        print(f"held-out emoji read right, {name}: {share:.1%}")
    weight, bias = fit(torch.cat(list(features.values())), labels.repeat(len(features)))
    with atomic(WEIGHTS) as temporary:
        save_file({"weight": weight, "bias": bias}, temporary)
    print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    run(main, make_script_parser(__doc__))
