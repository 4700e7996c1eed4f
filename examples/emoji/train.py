"""Train the emoji models and write their weights beside this file.

    python -m examples.emoji.train --what vae      # needs the skin tones, see rebuild.py
    python -m examples.emoji.train --what dit      # needs the VAE
    python -m examples.emoji.train --what pixart   # needs the VAE

State is kept in ``results/emoji``: a run that was stopped goes on from there.
"""
import argparse
import json
from copy import deepcopy
from pathlib import Path

import torch

from cards import DiT_models
from cli.parser import make_script_parser, run
from diffusion import make_schedule
from examples.emoji.autoencoder import (
    augment,
    autoencoder_loss,
    build_autoencoder,
    encode,
    load_autoencoder,
    mean_variance,
    recolour,
    reconstruction_psnr,
    training_tensors,
    whiten_latents,
)
from examples.emoji.data import IMAGE_SIZE, drawn_emoji
from examples.emoji.dit import image_weights, training_latents, weighted_loss
from examples.emoji.outliers import outlier_ratios
from examples.emoji.pixart import (
    TextToNoise,
    all_tokens,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    draw_tokens,
    prompts_of,
    save_pipeline,
    words_of,
)
from examples.emoji.training import Run, train
from examples.training import save_half
from models import build_model

HERE = Path(__file__).parent
# Of both models; a part of PixArt's pipeline.
VAE = Path("pixart", "vae")
STATES = Path("results/emoji")


def train_vae(args: argparse.Namespace) -> None:
    """Train the VAE and write it as a diffusers folder."""
    torch.manual_seed(args.seed)
    images, held_out = training_tensors()
    vae = build_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0)
    training = Run("VAE", args.state / "vae.pt", vae, vae, optimizer, {})

    def loss() -> torch.Tensor:
        pick = torch.randint(len(images), (args.vae_batch,))
        return autoencoder_loss(vae, recolour(augment(images[pick])))

    def watch(training: Run, step: int) -> None:
        psnr = reconstruction_psnr(vae, held_out)
        training.curves.setdefault("psnr", []).append((step, psnr))
        print(f"\nstep {step}: {psnr:.2f} dB on {len(held_out)} held-out images", flush=True)

    train(training, loss, args.vae_steps, peak=1.5e-3, decay=0.0, watch=watch)
    vae.eval()
    whiten_latents(vae, encode(vae, images), mean_variance(vae, images))
    vae.half().save_pretrained(args.out / VAE)
    print(f"held-out images: {reconstruction_psnr(vae.float(), held_out):.2f} dB")


def train_dit(args: argparse.Namespace) -> None:
    """Train DiT-Emoji; write its averaged weights and the curves of its outlier channels."""
    torch.manual_seed(args.seed)
    latents, labels = training_latents(load_autoencoder(args.out / VAE))
    weights = image_weights(labels)
    schedule = make_schedule()
    model = build_model(DiT_models["DiT-Emoji"], IMAGE_SIZE)
    model.initialize_weights()
    average = deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    training = Run("DiT", args.state / "dit.pt", model, average, optimizer, {})

    def loss() -> torch.Tensor:
        pick = torch.multinomial(weights, args.dit_batch, replacement=True)
        return weighted_loss(model, schedule, latents[pick], labels[pick])

    def watch(training: Run, step: int) -> None:
        # Every seventh image: a few of every class.
        ratios = outlier_ratios(average, schedule, latents[::7], labels[::7])
        for name, ratio in ratios.items():
            training.curves.setdefault(name, []).append((step, ratio))

    train(training, loss, args.dit_steps, peak=1e-3, decay=0.999, watch=watch)
    save_half(average.state_dict(), args.out / "dit.safetensors")
    (args.out / "dit-curves.json").write_text(json.dumps(training.curves))


def train_pixart(args: argparse.Namespace) -> None:
    """Train PixArt-Emoji and its text encoder; write the pipeline's folder."""
    torch.manual_seed(args.seed)
    vae = load_autoencoder(args.out / VAE)
    latents, _ = training_latents(vae)
    prompts = prompts_of(drawn_emoji())
    tokenizer = build_tokenizer(words_of(prompts))
    # A mirror image is called what the emoji is called.
    tokens = all_tokens(tokenizer, prompts).repeat(2, 1, 1)
    schedule = make_schedule()
    model = TextToNoise(build_text_encoder(len(tokenizer)), build_transformer())
    average = deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    training = Run("PixArt", args.state / "pixart.pt", model, average, optimizer, {})

    def loss() -> torch.Tensor:
        pick = torch.randint(len(latents), (args.dit_batch,))
        return weighted_loss(model, schedule, latents[pick], draw_tokens(tokens, pick))

    train(training, loss, args.pixart_steps, peak=1e-3, decay=0.999, watch=watch_nothing)
    save_pipeline(vae, tokenizer, average, args.out / "pixart")


def watch_nothing(training: Run, step: int) -> None:
    """Log no curve but the loss."""


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    {"vae": train_vae, "dit": train_dit, "pixart": train_pixart}[args.what](args)


if __name__ == "__main__":
    parser = make_script_parser(__doc__)
    parser.add_argument("--what", choices=("vae", "dit", "pixart"), required=True)
    parser.add_argument("--vae-steps", type=int, default=2800)
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--dit-steps", type=int, default=26000)
    parser.add_argument("--dit-batch", type=int, default=64, help="of DiT and PixArt")
    parser.add_argument("--pixart-steps", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=STATES)
    parser.add_argument("--out", type=Path, default=HERE, help="of the VAE and the weights")
    run(main, parser)
