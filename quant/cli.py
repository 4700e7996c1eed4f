"""What the command lines share: one-line errors with exit status 2, and the flags that say which model is meant."""
import argparse
import ctypes
import os
import sys
from collections.abc import Callable

import config
from config import UserError
from models import DiT_models, ModelCard


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


MMAP_MAX, TRIM_THRESHOLD = -4, -1  # parameters of mallopt(3)


def keep_freed_memory() -> None:
    """Make glibc hand freed memory to the next tensor instead of to the system; does nothing with another C library.

    Otherwise every tensor above 128 KiB may be fresh pages, which the kernel clears: a third of the time of sampling a small model on a CPU, a fifth of a larger one's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)  # the threshold for mmap cannot be set above 32 MiB, which the tensors of large batches exceed
        mallopt(TRIM_THRESHOLD, 1 << 30)


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


def user_value(call: Callable, *args):
    """``call(*args)``, with its ``ValueError`` taken for the user's mistake."""
    try:
        return call(*args)
    except ValueError as error:
        raise UserError(str(error)) from None


def find_card(name: str) -> ModelCard:
    """Raises:
        UserError: no such model.
    """
    if name not in DiT_models:
        raise UserError(f"unknown model '{name}': expected one of {', '.join(DiT_models)}")
    return DiT_models[name]


def one_of(value, allowed, flag: str):
    """Raises:
        UserError: ``value`` is not allowed.
    """
    if value not in allowed:
        raise UserError(f"{flag} {value} is not available: expected one of {', '.join(map(str, allowed))}")
    return value


def at_least(value: float, minimum: float, flag: str):
    """Raises:
        UserError: ``value`` is below ``minimum``, or not a number.
    """
    if not value >= minimum:
        raise UserError(f"{flag} {value} is too small: expected at least {minimum}")
    return value


def class_labels(text: str, num_classes: int) -> list[int]:
    """A comma-separated list of classes.

    Raises:
        UserError: not numbers, or out of range.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < num_classes for part in parts):
        raise UserError(f"bad class labels '{text}': expected numbers from 0 to {num_classes - 1}, separated by commas")
    return [int(part) for part in parts]


def add_model_flags(parser: Parser) -> None:
    parser.add_argument("--model", help=f"one of {', '.join(DiT_models)} (default: {config.default_model})")
    parser.add_argument("--image-size", type=int, help="pixels per side (default: 256, or what the model makes)")
    parser.add_argument("--num-classes", type=int, help="classes the model knows (default: 1000, or what the model has)")
    parser.add_argument("--ckpt", help="float weights: .pt, .safetensors or a diffusers folder (default: the published or bundled ones)")
    parser.add_argument("--vae", choices=("ema", "mse"), default="ema", help="which Stable Diffusion VAE decodes the latents (default: ema)")
    parser.add_argument("--weight-bit", type=int, help="2 to 8 bits per weight")
    parser.add_argument("--act-bit", type=int, help="4 to 8 bits per activation, or 16 to leave them alone")
