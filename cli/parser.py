"""What the command lines share: one-line errors with exit status 2, and a model's flags."""
import argparse
import os
import sys
from collections.abc import Callable, Iterable

import config
from cards import DiT_models, ModelCard
from cli.memory import keep_freed_memory
from errors import UserError, as_flag

# Which Stable Diffusion VAE decodes the latents, if the command line does not say.
DEFAULT_VAE = "ema"


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def make_script_parser(description: str) -> Parser:
    """Make a parser whose help shows ``description``, a script's docstring, as it is written."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(
    main: Callable[[argparse.Namespace], None],
    parser: Parser,
    argv: list[str] | None = None,  # without the script's name; None: those of the process
) -> None:
    """Parse the command line and call ``main``.

    A ``UserError`` becomes one line on stderr and exit status 2.
    """
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        main(args)
    except UserError as error:
        # All processes of a machine find the same mistake: one of them says so.
        if error.every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            line = " ".join(error.spelled(as_flag).split())
            print(f"{parser.prog}: error: {line}", file=sys.stderr)
        sys.exit(2)


def refuse_flags(
    args: argparse.Namespace, parser: Parser, names: Iterable[str], whose: str,
) -> None:
    """Refuse flags that were given and that nothing would read.

    Args:
        parser: knows what they are by default.
        whose: what they are for.

    Raises:
        UserError: one of ``names`` is not what it is by default.
    """
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is for {whose}: drop it")


def find_card(name: str, otherwise: str = "") -> ModelCard:
    """Look a model up by name.

    Args:
        otherwise: what else a command takes, for the message.

    Raises:
        UserError: no such model.
    """
    if name not in DiT_models:
        more = f", {otherwise}" if otherwise else ""
        raise UserError(f"unknown model '{name}': expected one of {', '.join(DiT_models)}{more}")
    return DiT_models[name]


def add_model_flags(parser: Parser, otherwise: str) -> None:
    """Add the flags that say which model is meant; ``otherwise`` is what else ``--model`` takes."""
    parser.add_argument(
        "--model",
        help=f"one of {', '.join(DiT_models)}, {otherwise} (default: {config.default_model})")
    parser.add_argument(
        "--image-size", type=int,
        help="pixels per side (default: 256, or what the model makes)")
    parser.add_argument(
        "--num-classes", type=int,
        help="classes the model knows (default: 1000, or what the model has)")
    parser.add_argument(
        "--ckpt",
        help="float weights: .pt, .safetensors or a diffusers folder "
             "(default: the published or bundled ones)")
    parser.add_argument(
        "--vae", choices=("ema", "mse"), default=DEFAULT_VAE,
        help=f"which Stable Diffusion VAE decodes the latents (default: {DEFAULT_VAE})")
    parser.add_argument(
        "--weight-bit", type=int, help="2 to 8 bits per weight, or 16 to leave them alone")
    parser.add_argument(
        "--act-bit", type=int, help="4 to 8 bits per activation, or 16 to leave them alone")


def add_threads_flag(parser: Parser, more: str = "") -> None:
    """Add ``--threads``; ``more`` is what else its help says."""
    parser.add_argument(
        "--threads", type=int,
        help=f"CPU threads per process{more} (default: OMP_NUM_THREADS, else all cores, shared)")
