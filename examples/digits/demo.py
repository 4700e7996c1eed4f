"""The demo behind ``make demo``: quantise the bundled model with every recipe, sample, print a table.

Numbers: SQNR of the final latents against the float model with the same noise; share of images that the bundled classifier
reads as the class asked for; Fréchet distance between the classifier's 64 features of these images and of the 1797 real digits.
"""
import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import ddpm_step, make_schedule
from diffusion.generate import generate_latents
from download import load_model
from examples.digits.classifier import load_classifier
from examples.digits.data import IMAGE_SIZE, decode, load_images
from metrics import frechet_distance, sqnr_db
from models import DiT_models
from quant import checkpoint
from quant.merge import fold

STEPS = 50
ROWS = (("rtn", 4, ()), ("smoothquant", 4, ("--smooth-timestep", "0")), ("ditas-published", 4, ()), ("ditas", 4, ()), ("ditas", 8, ()))


def shell(*words: str) -> None:
    print(f"\n$ {shlex.join(('python', *words))}", flush=True)
    subprocess.run([sys.executable, *words], check=True)


def latents(model: nn.Module, count: int, seed: int) -> Tensor:
    labels = torch.arange(count) % 10
    return generate_latents(model, make_schedule(str(STEPS)), range(count), labels, seed, 1.5, ddpm_step)


@torch.inference_mode()
def judge(images: Tensor) -> tuple[float, float]:
    """Accuracy and Fréchet distance of images (N, 1, 16, 16) whose labels are 0 to 9 in turn."""
    classifier = load_classifier()
    real = classifier.features(load_images()[0])
    right = classifier(images).argmax(1) == torch.arange(len(images)) % 10
    return right.float().mean().item(), frechet_distance(classifier.features(images).numpy(), real.numpy())


def main(args: argparse.Namespace) -> None:
    torch.set_grad_enabled(False)
    results = Path(args.output)
    model = load_model(args.model, DiT_models[args.model], IMAGE_SIZE, 10, None, torch.device("cpu"))
    float_size = sum(p.numel() for p in model.parameters()) * 4
    reference = latents(model, args.count, args.seed)
    table = [("float", "32/32", f"{float_size / 1e6:.1f}", "-", "-", *judge(decode(reference)))]
    for recipe, bits, flags in ROWS:
        label = " ".join([recipe, *(f"t={flags[1]}" for _ in flags[:1])])
        path = results / f"{args.model}-W{bits}A8-{label.replace(' ', '-')}.safetensors"
        started = time.perf_counter()
        shell("QuantDiT.py", "--model", args.model, "--recipe", recipe, "--weight-bit", str(bits), "--num-sampling-steps", str(STEPS),
              "--seed", str(args.seed), "--output", str(path), *flags)
        seconds = time.perf_counter() - started
        header, quantised = checkpoint.load(path)
        made = latents(fold(quantised), args.count, args.seed)
        table.append((label, f"{header.weight_bit}/{header.act_bit}", f"{path.stat().st_size / 1e6:.1f}", f"{seconds:.0f}",
                      f"{sqnr_db(reference, made):.1f}", *judge(decode(made))))
    shell("sample_merge_TAS.py", "--path", str(results / f"{args.model}-W4A8-ditas.safetensors"), "--num-fid-samples", "32",
          "--per-proc-batch-size", "16", "--sample-dir", str(results / "samples"))

    print(f"\n{args.model}: {args.count} images, {STEPS} DDPM steps, guidance 1.5, seed {args.seed}")
    if args.model == "DiT-Digits-Outliers":
        print("(its outlier channels were put in by examples/digits/outliers.py; the model it was made from has none)")
    print(f"\n| {'recipe':<16} | W/A   | MB   | s   | SQNR dB | read right | FID (digits) |")
    print("|---|---|---|---|---|---|---|")
    for recipe, bits, size, seconds, sqnr, accuracy, fid in table:
        print(f"| {recipe:<16} | {bits:<5} | {size:>4} | {seconds:>3} | {sqnr:>7} | {accuracy:>10.1%} | {fid:>12.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("DiT-Digits", "DiT-Digits-Outliers"), default="DiT-Digits-Outliers")
    parser.add_argument("--count", type=int, default=100, help="images per row (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/demo", help="folder for checkpoints, pictures and samples")
    main(parser.parse_args())
