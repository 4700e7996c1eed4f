"""Measure how long loading a quantised transformer takes, and how much memory, against reading it.

    python benchmarks/folders.py                             # writes 173 MB to results/folders
    python benchmarks/folders.py --width 3072 --depth 20     # 1.5 GB, blocks as wide as Flux's

The model is diffusers' PixArt with random parameters, ``rtn`` at W4A8, in bfloat16. Two blocks are
quantised; the others have the same tensors. What is compared takes turns, each time in a process of
its own:

read    the bytes of the file, into memory
views   safetensors' ``load_file``, and a look at every page of its tensors
copies  the same, and a copy of every tensor, as whatever outlives its file needs
load    ``from_pretrained``

Once the file is in the page cache (warm), once it is not (cold). Imports are not counted. A peak is
the growth of the largest resident set (``VmHWM``), in which a mapped file counts, too; what remains
as the process's own (``RssAnon``) stands beside it. The first call of a loaded model expands its
linears; what that takes is measured once.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ditas
from benchmarks.memory import MEGABYTE, calls, forget_peak, random_pixart, resident
from benchmarks.sections import timed
from cli.memory import return_freed_memory
from cli.parser import make_script_parser, run

HEAD = 64
BLOCKS = 2  # that are quantised
CHUNK = 1 << 20
PAGE = os.sysconf("SC_PAGESIZE")
KIND = torch.bfloat16

# What is measured, and the heads of its columns.
COLUMNS = {"seconds": "s", "processor": "processor s", "peak": "peak, MB", "own": "own, MB"}

Numbers = dict[str, float]


def weights_of(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def write_folder(folder: Path, width: int, depth: int) -> None:
    """Quantise a random model and save it with ``depth`` blocks."""
    model = random_pixart(width, BLOCKS, KIND, HEAD)
    ditas.quantize(model, None, "rtn", weight_bit=4, act_bit=8)
    model.save_pretrained(folder)

    # The tensors of blocks, again and again.
    saved, repeated = load_file(weights_of(folder)), {}
    for name, value in saved.items():
        for twin in names_of(name, depth):
            repeated[twin] = value.clone()
    save_file(repeated, weights_of(folder))

    # What says of which blocks there are.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["num_layers"] = depth
    for layout in config["quantization_config"]["stored"]["layouts"]:
        layout["linears"] = [twin for name in layout["linears"] for twin in names_of(name, depth)]
    path.write_text(json.dumps(config))


def names_of(name: str, depth: int) -> list[str]:
    """Name a tensor or module of a block in all blocks that are like it."""
    place, _, rest = name.partition(".")
    number, _, end = rest.partition(".")
    if place != "transformer_blocks":
        return [name]
    return [f"{place}.{twin}.{end}" for twin in range(int(number), depth, BLOCKS)]


def read(folder: Path) -> bytes:
    return weights_of(folder).read_bytes()


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


WAYS: dict[str, Callable[[Path], object]] = {
    "read": read, "views": views, "copies": copies, "load": load}
FIRST_CALL = "first call"


def measure(way: str, folder: Path) -> Numbers:
    """Measure one of ``WAYS`` in this process: seconds, and MB of growth."""
    # All that is imported while a model is loaded.
    import accelerate  # noqa: F401
    from diffusers import PixArtTransformer2DModel  # noqa: F401

    import ditas.adapters  # noqa: F401
    import quant.integer.cpu  # noqa: F401

    forget_peak()
    before, own = resident("VmRSS"), resident("RssAnon")
    if way == FIRST_CALL:
        return measure_first_call(folder, before)
    start = time.process_time()
    result, seconds = timed(partial(WAYS[way], folder))
    numbers = {"seconds": seconds, "processor": time.process_time() - start,
               "peak": resident("VmHWM") - before, "own": resident("RssAnon") - own}
    del result
    return numbers


def measure_first_call(folder: Path, before: float) -> Numbers:
    """Measure the expansion of a loaded model: seconds, and MB over ``before``."""
    model, call = load(folder), calls(KIND)[0]
    _, first = timed(lambda: model(**call))
    _, second = timed(lambda: model(**call))
    return {"seconds": first - second, "grown": resident("VmRSS") - before}


def measure_apart(way: str, folder: Path, is_cold: bool) -> Numbers:
    """Measure one of ``WAYS`` in a process of its own."""
    prepare = forget_file if is_cold else remember_file
    prepare(weights_of(folder))
    command = [sys.executable, __file__, "--folder", str(folder), "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def remember_file(path: Path) -> None:
    """Let the system have a file in its cache."""
    with path.open("rb") as file:
        while file.read(CHUNK):
            pass


def forget_file(path: Path) -> None:
    """Let the system drop a file from its cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(folder: Path, is_cold: bool, rounds: int) -> dict[str, Numbers]:
    """Return the medians of all ways, which take turns."""
    numbers: dict[str, list[Numbers]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            numbers[way].append(measure_apart(way, folder, is_cold))
    return {way: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for way, rows in numbers.items()}


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Print the table, or the numbers of one way."""
    folder = Path(args.folder) / f"rtn-W4A8-{args.width}-{args.depth}"
    if args.way is not None:
        print(json.dumps(measure(args.way, Path(args.folder))))
        return
    if not weights_of(folder).exists():
        write_folder(folder, args.width, args.depth)
        return_freed_memory()
    size = weights_of(folder).stat().st_size / MEGABYTE
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, a file of {size:.0f} "
          f"MB, medians of {args.rounds} rounds")
    for name, is_cold in (("warm", False), ("cold", True)):
        table = compare(folder, is_cold, args.rounds)
        print(f"\n| {name} | {' | '.join(f'{title} | / read' for title in COLUMNS.values())} |")
        print("|---" * (1 + 2 * len(COLUMNS)) + "|")
        for way, row in table.items():
            print_row(way, row, table["read"])
    if args.first_call:
        expanding = measure_apart(FIRST_CALL, folder, False)
        print(f"\nThe first call expands {expanding['seconds']:.2f} s long, to "
              f"{expanding['grown']:.0f} MB.")


def print_row(way: str, row: Numbers, reading: Numbers) -> None:
    """Print what one way took, and its ratios to reading the file."""
    cells = [f"{row[name]:.4g} | {row[name] / reading[name]:.2f}" for name in COLUMNS]
    print(f"| {way} | {' | '.join(cells)} |")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = make_script_parser(__doc__)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--depth", type=int, default=14, help="blocks")
    parser.add_argument(
        "--first-call", action=argparse.BooleanOptionalAction, default=True,
        help="measure the expansion of the loaded linears, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="results/folders")
    parser.add_argument(
        "--way", choices=[*WAYS, FIRST_CALL], help="only print the numbers of this, as JSON")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
