"""Measure how long loading a quantised transformer takes, and how much memory, against reading it.

    python benchmarks/folders.py                 # writes 173 MB to results/folders
    python benchmarks/folders.py --depth 28      # as many blocks as PixArt-Sigma has

The model is diffusers' PixArt of width 1152 with random parameters, ``rtn`` at W4A8, in bfloat16.
What is compared takes turns, each time in a process of its own:

views   safetensors' ``load_file``, and a look at every page of its tensors
copies  the same, and a copy of every tensor, as whatever outlives its file needs
load    ``from_pretrained``

Once the file is in the page cache (warm), once it is not (cold). Imports are not counted. A peak is
the growth of the largest resident set (``VmHWM``), in which a mapped file counts, too. The first
call of a loaded model expands its linears; what that takes stands beside it.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ditas
from benchmarks.memory import MEGABYTE, calls, forget_peak, random_pixart, resident
from benchmarks.sections import timed
from cli.parser import make_script_parser, run

WIDTH = 1152
PAGE = os.sysconf("SC_PAGESIZE")
KIND = torch.bfloat16


def weights_of(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def write_folder(folder: Path, depth: int) -> None:
    """Quantise a random model and save it."""
    model = random_pixart(WIDTH, depth, KIND)
    ditas.quantize(model, None, "rtn", weight_bit=4, act_bit=8, backend="integer")
    model.save_pretrained(folder)


def views(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(weights_of(folder))
    for value in tensors.values():
        value.flatten().view(torch.uint8)[::PAGE].sum()
    return tensors


def copies(folder: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in load_file(weights_of(folder)).items()}


def load(folder: Path) -> nn.Module:
    from diffusers import PixArtTransformer2DModel
    return PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=KIND)


WAYS: dict[str, Callable[[Path], object]] = {"views": views, "copies": copies, "load": load}


def measure(way: str, folder: Path) -> dict[str, float]:
    """Measure one of ``WAYS`` in this process: seconds, and MB of growth."""
    # All that is imported while a model is loaded.
    import accelerate  # noqa: F401
    from diffusers import PixArtTransformer2DModel  # noqa: F401

    forget_peak()
    before = resident("VmRSS")
    result, seconds = timed(partial(WAYS[way], folder))
    numbers = {"seconds": seconds, "peak": resident("VmHWM") - before}
    if isinstance(result, nn.Module):
        call = calls(KIND)[0]
        _, first = timed(lambda: result(**call))
        _, second = timed(lambda: result(**call))
        numbers |= {"expanding": first - second, "expanded": resident("VmRSS") - before}
    return numbers


def measure_apart(way: str, folder: Path, is_cold: bool) -> dict[str, float]:
    """Measure one of ``WAYS`` in a process of its own."""
    if is_cold:
        forget_file(weights_of(folder))
    command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def forget_file(path: Path) -> None:
    """Let the system drop a file from its cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(folder: Path, is_cold: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians of all ways, which take turns."""
    numbers: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            numbers[way].append(measure_apart(way, folder, is_cold))
    return {way: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for way, rows in numbers.items()}


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Print the table, or the numbers of one way."""
    folder = Path(args.folder) / f"rtn-W4A8-{args.depth}"
    if args.way is not None:
        print(json.dumps(measure(args.way, Path(args.folder))))
        return
    if not weights_of(folder).exists():
        write_folder(folder, args.depth)
    size = weights_of(folder).stat().st_size / MEGABYTE
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, a file of {size:.0f} "
          f"MB, medians of {args.rounds} rounds")
    for name, is_cold in (("warm", False), ("cold", True)):
        table = compare(folder, is_cold, args.rounds)
        reading = table["copies"]
        print(f"\n| {name} | s | / copies | peak, MB | / copies |\n|---|---|---|---|---|")
        for way, row in table.items():
            print(f"| {way} | {row['seconds']:.2f} | {row['seconds'] / reading['seconds']:.2f} "
                  f"| {row['peak']:.0f} | {row['peak'] / reading['peak']:.2f} |")
        loaded = table["load"]
        print(f"\nThe first call then expands {loaded['expanding']:.2f} s long, to "
              f"{loaded['expanded']:.0f} MB.")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = make_script_parser(__doc__)
    parser.add_argument("--depth", type=int, default=14, help="blocks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="results/folders")
    parser.add_argument("--way", choices=WAYS, help="only print the numbers of this, as JSON")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
