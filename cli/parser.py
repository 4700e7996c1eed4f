"""What the command lines share: one-line errors with exit status 2, and the flags that say which model is meant."""
import argparse
import os
import sys
from collections.abc import Callable

import config
from cli.memory import keep_freed_memory
from errors import UserError
from models import DiT_models, ModelCard


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def run(main: Callable[[argparse.Namespace], None], parser: Parser, argv: list[str] | None = None) -> None:
    """Parse the command line and call ``main``; a ``UserError`` becomes one line on stderr and exit status 2."""
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        main(args)
    except UserError as error:
        if error.every_rank or os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a machine find the same mistake: one says so
            print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def find_card(name: str) -> ModelCard:
    """Raises:
        UserError: no such model.
    """
    if name not in DiT_models:
        raise UserError(f"unknown model '{name}': expected one of {', '.join(DiT_models)}")
    return DiT_models[name]


def add_model_flags(parser: Parser) -> None:
    parser.add_argument("--model", help=f"one of {', '.join(DiT_models)} (default: {config.default_model})")
    parser.add_argument("--image-size", type=int, help="pixels per side (default: 256, or what the model makes)")
    parser.add_argument("--num-classes", type=int, help="classes the model knows (default: 1000, or what the model has)")
    parser.add_argument("--ckpt", help="float weights: .pt, .safetensors or a diffusers folder (default: the published or bundled ones)")
    parser.add_argument("--vae", choices=("ema", "mse"), default="ema", help="which Stable Diffusion VAE decodes the latents (default: ema)")
    parser.add_argument("--weight-bit", type=int, help="2 to 8 bits per weight")
    parser.add_argument("--act-bit", type=int, help="4 to 8 bits per activation, or 16 to leave them alone")
