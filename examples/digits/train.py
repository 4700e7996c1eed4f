"""Train the digits DiT and its classifier and write their weights beside this file.

    python -m examples.digits.train              # both
    python -m examples.digits.train --steps 50   # a quick check

Both took 41 minutes on two CPU cores that also did other work.
"""
import argparse
from copy import deepcopy
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from cards import DiT_models
from cli.parser import make_script_parser, run
from diffusion import make_schedule
from diffusion.loss import training_loss
from examples.digits.classifier import DigitClassifier, augment
from examples.digits.data import IMAGE_SIZE, encode, load_images
from examples.training import learning_rate, save_half
from models import build_model

HERE = Path(__file__).parent


def train_dit(
    steps: int,
    batch: int,
    seed: int,
    ema_decay: float = 0.999,
) -> dict[str, torch.Tensor]:
    """Train the DiT on the digits' latents; return the moving average of its weights."""
    torch.manual_seed(seed)
    images, labels = load_images()
    latents = encode(images)
    schedule = make_schedule()

    model = build_model(DiT_models["DiT-Digits"], IMAGE_SIZE)
    model.initialize_weights()
    ema = deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.0)

    average = None
    bar = tqdm(range(steps), desc="DiT", unit="step")
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak=1e-3, warmup=200, floor=0.05)

        # One step on the loss at random timesteps.
        pick = torch.randint(len(latents), (batch,))
        t = torch.randint(len(schedule), (batch,))
        noise = torch.randn(batch, *latents.shape[1:])
        loss = training_loss(model, schedule, latents[pick], t, labels[pick], noise).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

        # Moving averages: of the weights, faster at first, and of the loss that is shown.
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
    return ema.state_dict()


def train_classifier(epochs: int, seed: int) -> dict[str, torch.Tensor]:
    """Fit on every second digit, print the accuracy on the rest, then fit on all of them."""
    images, labels = load_images()
    half = torch.arange(0, len(images), 2)
    held_out = torch.arange(1, len(images), 2)
    model = fit_classifier(images[half], labels[half], epochs, seed)
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    print(f"classifier trained on half the digits reads {accuracy:.2%} of the other half")
    return fit_classifier(images, labels, epochs, seed).state_dict()


def fit_classifier(
    images: torch.Tensor,
    labels: torch.Tensor,
    epochs: int,
    seed: int,
) -> DigitClassifier:
    """Fit a fresh classifier to images (N, 1, 16, 16) and labels (N,)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitClassifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in tqdm(range(epochs), desc="classifier", unit="epoch"):
        for pick in torch.randperm(len(images)).split(64):
            optimiser.zero_grad(set_to_none=True)
            logits = model(augment(images[pick], generator))
            cross_entropy(logits, labels[pick]).backward()
            optimiser.step()
        decay.step()
    return model


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    classifier = train_classifier(args.epochs, args.seed)
    save_half(classifier, args.out / "classifier.safetensors")
    dit = train_dit(args.steps, args.batch, args.seed)
    save_half(dit, args.out / "dit.safetensors")


if __name__ == "__main__":
    parser = make_script_parser(__doc__)
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    run(main, parser)
