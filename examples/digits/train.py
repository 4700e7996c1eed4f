"""Train the digits DiT and its classifier and write their weights beside this file.

    python -m examples.digits.train              # both; 41 minutes on two CPU cores that also did other work
    python -m examples.digits.train --steps 50   # a quick check
"""
import argparse
import math
import os
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from diffusion import make_schedule
from diffusion.loss import training_loss
from examples.digits.classifier import DigitClassifier, augment
from examples.digits.data import IMAGE_SIZE, encode, load_images
from models import DiT_models

HERE = Path(__file__).parent


def learning_rate(step: int, steps: int, peak: float = 1e-3, warmup: int = 200, floor: float = 0.05) -> float:
    """Linear warm-up, then a cosine from ``peak`` to ``floor * peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_dit(steps: int, batch: int, seed: int, ema_decay: float = 0.999) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    images, labels = load_images()
    latents = encode(images)
    schedule = make_schedule()
    model = DiT_models["DiT-Digits"].build(IMAGE_SIZE)
    model.initialize_weights()
    ema = deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    bar = tqdm(range(steps), desc="DiT", unit="step")
    average = None
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        pick = torch.randint(len(latents), (batch,))
        t = torch.randint(len(schedule), (batch,))
        loss = training_loss(model, schedule, latents[pick], t, labels[pick], torch.randn(batch, *latents.shape[1:])).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
    return ema.state_dict()


def train_classifier(epochs: int, seed: int) -> dict[str, torch.Tensor]:
    """Fit on every second digit, print the accuracy on the rest, then fit on all of them."""
    images, labels = load_images()
    every, held_out = torch.arange(len(images)), torch.arange(1, len(images), 2)
    for train in (torch.arange(0, len(images), 2), every):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = DigitClassifier()
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
        for _ in tqdm(range(epochs), desc="classifier", unit="epoch"):
            for pick in train[torch.randperm(len(train))].split(64):
                optimiser.zero_grad(set_to_none=True)
                cross_entropy(model(augment(images[pick], generator)), labels[pick]).backward()
                optimiser.step()
            decay.step()
        if train is not every:
            with torch.no_grad():
                accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean()
            print(f"classifier trained on half the digits reads {accuracy:.2%} of the other half")
    return model.state_dict()


def save_half(state: dict[str, torch.Tensor], path: Path) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: value.half().contiguous() for name, value in state.items()}, temporary)
    os.replace(temporary, path)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    save_half(train_classifier(args.epochs, args.seed), args.out / "classifier.safetensors")
    save_half(train_dit(args.steps, args.batch, args.seed), args.out / "dit.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    main(parser.parse_args())
