"""Time and memory of one forward pass: floating point, torchao and ours.

    pip install torchao                                    # only for its row
    python benchmarks/inference.py                         # several minutes, 12 GB of memory
    python benchmarks/inference.py --model DiT-B/2 --batch 2 16

The model is DiT-XL/2 at 256 pixels unless said otherwise, with random weights. Ours runs simulated
and on integers.

Each row is loaded in a process of its own for its memory: the largest resident set, or device
memory, during a forward pass. Then all are timed in one process, in turn. Quantised checkpoints are
made once and kept in ``--folder``.
"""
import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import torch
from torch import nn
from tqdm import tqdm

from architectures.registry import architecture_of
from architectures.sites import modulations
from benchmarks.sections import timed
from benchmarks.subjects import block_linears, randomise
from cards import DiT_models
from cli.memory import keep_freed_memory
from config import RECIPES, lowrank_rank
from errors import UserError
from models import DiT, build_model
from quant import checkpoint
from quant.activations.quantisers import Activation
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.pipeline import Result
from quant.recipe import act_spec, adaln_spec, weight_spec
from quant.weights.low_rank import LowRankWeight, without_branch
from quant.weights.rounding import quantize_weight

# All rows compile the same block's code, each with other modules and batch sizes.
torch._dynamo.config.recompile_limit = 64

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECIPE = RECIPES["ditas"]


@dataclass(frozen=True)
class Row:
    """A way to run the model."""

    load: Callable[[], nn.Module]
    disk: float  # bytes of its weights on disk


def random_float(name: str) -> DiT:
    torch.manual_seed(0)
    model = build_model(DiT_models[name], 256)
    randomise(model, std=0.02)
    return model.eval()


def checkpoint_path(folder: Path, name: str, weight_bits: int) -> Path:
    return folder / f"{name.replace('/', '-')}-W{weight_bits}A8.safetensors"


def prepare(folder: Path, name: str) -> None:
    """Write checkpoints of a random model at W4A8 and W8A8, unless they are there."""
    for weight_bits in (4, 8):
        path = checkpoint_path(folder, name, weight_bits)
        if not is_current(path):
            write_checkpoint(path, name, weight_bits)


def is_current(path: Path) -> bool:
    with suppress(UserError):
        header = checkpoint.read_header(path)
        return header.recipe == RECIPE and header.format_version == checkpoint.FORMAT_VERSION
    return False


def write_checkpoint(path: Path, name: str, weight_bits: int) -> None:
    """Lay a random model out as recipe ditas does; factors and branches are random too."""
    model = random_float(name)

    # The modulation, weight-only.
    layers = {}
    for site in modulations(architecture_of(model).sites(model, "adaln")):
        key, linear = site.name, model.get_submodule(site.name)
        spec = adaln_spec(RECIPE.adaln_bits, linear.in_features)
        layers[key] = QuantizedLayer(without_branch(quantize_weight(linear.weight, spec)), None)

    # The four linears of every block.
    for key, linear in tqdm(block_linears(model).items(), desc=path.stem, unit="layer"):
        outputs, inputs = linear.weight.shape
        rank = lowrank_rank(RECIPE, min(outputs, inputs))
        left = (1e-5 * torch.randn(outputs, rank)).bfloat16().float()
        right = torch.randint(-127, 128, (rank, inputs)).float()
        base = quantize_weight(linear.weight, weight_spec(RECIPE, weight_bits))
        factors = torch.rand(inputs) + 0.5
        activation = Activation(act_spec(RECIPE, 8))
        layers[key] = QuantizedLayer(
            LowRankWeight(base, left, right), activation, Smoothing(factors))

    header = checkpoint.Header(
        model=name,
        image_size=256,
        num_classes=1000,
        weight_bit=weight_bits,
        act_bit=8,
        recipe_name="ditas",
        recipe=RECIPE,
        seed=0,
        num_sampling_steps="50",
        svd="fast",
        alphas={},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, model, Result(layers), header)


def compiled(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile()
    return model


def load_float(name: str, dtype: torch.dtype, compile_blocks: bool) -> nn.Module:
    model = random_float(name).to(DEVICE, dtype)
    return compiled(model) if compile_blocks else model


def load_torchao(name: str) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    model = random_float(name).to(DEVICE, torch.bfloat16)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return compiled(model)


def load_ours(path: Path, backend: str, dtype: torch.dtype, packed: bool = False) -> nn.Module:
    _, model = checkpoint.load(path, DEVICE, True, backend, dtype, packed)
    return compiled(model)


def make_rows(folder: Path, name: str, dtype: torch.dtype) -> dict[str, Row]:
    """Return the table's rows by name; ours compute in ``dtype``."""
    w4 = checkpoint_path(folder, name, 4)
    w8 = checkpoint_path(folder, name, 8)
    w4_bytes = w4.stat().st_size
    w8_bytes = w8.stat().st_size
    with torch.device("meta"):
        state = build_model(DiT_models[name], 256).state_dict()
    parameters = sum(tensor.numel() for tensor in state.values())

    rows = {}
    for label, dtype_of_row, compile_blocks in (
        ("float32", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
        ("bfloat16 compiled", torch.bfloat16, True),
    ):
        load = partial(load_float, name, dtype_of_row, compile_blocks)
        rows[label] = Row(load, parameters * dtype_of_row.itemsize)
    rows["torchao int8 dynamic, bfloat16 compiled"] = Row(partial(load_torchao, name), parameters)

    kind = f"{str(dtype).removeprefix('torch.')} compiled"
    rows[f"ours simulated W4A8, {kind}"] = Row(partial(load_ours, w4, "fake", dtype), w4_bytes)
    rows[f"ours W8A8, {kind}"] = Row(partial(load_ours, w8, "integer", dtype), w8_bytes)
    rows[f"ours W4A8, {kind}"] = Row(partial(load_ours, w4, "integer", dtype), w4_bytes)
    if DEVICE.type == "cpu":
        packed = partial(load_ours, w4, "integer", dtype, packed=True)
        rows[f"ours W4A8 packed, {kind}"] = Row(packed, w4_bytes)
    return rows


def make_inputs(batch: int, size: int) -> tuple[torch.Tensor, ...]:
    """Draw latents, timesteps and labels of a batch, on the device."""
    torch.manual_seed(1)
    x = torch.randn(batch, 4, size, size).to(DEVICE)
    t = torch.full((batch,), 500, device=DEVICE)
    y = (torch.arange(batch) % 1000).to(DEVICE)
    return x, t, y


def tensor_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's, of several tensors
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def weight_bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor_bytes(tensor) for tensor in tensors.values())


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading left over
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def peak_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(load: Callable[[], nn.Module], batch: int) -> dict[str, int]:
    """Return weight bytes, and the peak of memory during a forward pass, in this process."""
    model = load()
    inputs = make_inputs(batch, model.input_size)
    model(*inputs)  # compiles
    reset_peak()
    model(*inputs)
    return {"weights": weight_bytes(model), "peak": peak_bytes()}


def measure_apart(row: str, args: argparse.Namespace) -> dict[str, int] | None:
    """``measure`` a row in a process of its own; None, and a word why, where that fails."""
    command = [sys.executable, __file__, "--row", row, "--model", args.model]
    command += ["--dtype", args.dtype, "--folder", args.folder, "--batch", str(args.batch[0])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    print(f"left out: {row}: {lines[-1]}")
    return None


def time_batch(models: dict[str, nn.Module], batch: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of every model's forward pass; the models take turns."""
    size = next(iter(models.values())).input_size
    inputs = make_inputs(batch, size)
    for model in models.values():
        model(*inputs)  # compiles
    seconds = {row: [] for row in models}
    for _ in tqdm(range(rounds), desc=f"batch {batch}", unit="round"):
        for row, model in models.items():
            _, elapsed = timed(partial(model, *inputs), DEVICE)
            seconds[row].append(elapsed)
    return {row: statistics.median(values) for row, values in seconds.items()}


def print_machine(model: str) -> None:
    if DEVICE.type == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("model name"))
        processor = line.split(":")[1].strip()
    vnni = torch.cpu._is_vnni_supported()
    amx = torch.cpu._is_amx_tile_supported()
    print(f"PyTorch {torch.__version__}, {processor}, {torch.get_num_threads()} threads, "
          f"VNNI {vnni}, AMX {amx}; {model} at 256 pixels, random weights")


def main(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    prepare(folder, args.model)
    rows = make_rows(folder, args.model, getattr(torch, args.dtype))
    if args.row is not None:
        print(json.dumps(measure(rows[args.row].load, args.batch[0])))
        return

    # Memory, of every row that runs here.
    print_machine(args.model)
    memory = {}
    for row in rows:
        measured = measure_apart(row, args)
        if measured is not None:
            memory[row] = measured

    # Time, and a table for every batch size.
    models = {row: rows[row].load() for row in memory}
    for batch in args.batch:
        median = time_batch(models, batch, args.rounds)
        bfloat16 = median.get("bfloat16 compiled", float("nan"))
        float32 = median.get("float32", float("nan"))
        print(f"\n| batch {batch} | ms per forward | / bfloat16 compiled | / float32 "
              f"| peak memory (batch {args.batch[0]}), MB | weights, MB | on disk, MB |")
        print("|---|---|---|---|---|---|---|")
        for row, seconds in median.items():
            peak = memory[row]["peak"] / 1e6
            weights = memory[row]["weights"] / 1e6
            print(f"| {row} | {1000 * seconds:.0f} | {seconds / bfloat16:.2f} "
                  f"| {seconds / float32:.2f} | {peak:.0f} | {weights:.0f} "
                  f"| {rows[row].disk / 1e6:.0f} |")


def make_parser() -> argparse.ArgumentParser:
    cuda = DEVICE.type == "cuda"
    fast_bfloat16 = cuda or torch.cpu._is_avx512_bf16_supported()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2", choices=DiT_models)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[2, 32, 128] if cuda else [2, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        default="bfloat16" if fast_bfloat16 else "float32",
        help="of our rows (default: bfloat16 where the processor multiplies it)")
    parser.add_argument("--folder", default="results/inference")
    parser.add_argument("--row", help="only print the memory of this row, as JSON")
    return parser


if __name__ == "__main__":
    keep_freed_memory()  # as the scripts do
    with torch.no_grad():
        main(make_parser().parse_args())
