"""Time and memory of one forward pass: floating point, torchao and ours, simulated and on integers.

    pip install torchao                                    # only for its row
    python benchmarks/inference.py                         # DiT-XL/2 at 256 pixels, random weights; several minutes, 12 GB of memory
    python benchmarks/inference.py --model DiT-B/2 --batch 2 16

Each row is loaded in a process of its own for its memory (largest resident set, or device memory, during a forward pass); then all
are timed in one process, in turn. Quantised checkpoints are made once and kept in ``--folder``.
"""
import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from tqdm import tqdm

from architectures.dit import block_linears, modulation_linears
from cli.memory import keep_freed_memory
from config import RECIPES
from errors import UserError
from models import DiT, DiT_models
from quant import checkpoint
from quant.activations.quantisers import Activation
from quant.layers.quantised import QuantizedLayer
from quant.pipeline import Result
from quant.recipe import act_spec, adaln_spec, weight_spec
from quant.weights.low_rank import LowRankWeight, without_branch
from quant.weights.rounding import quantize_weight

torch._dynamo.config.recompile_limit = 64  # all rows compile the same block's code, each with other modules and batch sizes
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECIPE = RECIPES["ditas"]


def random_float(name: str) -> DiT:
    torch.manual_seed(0)
    model = DiT_models[name].build(256)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.02)
    return model.eval()


def prepare(folder: Path, name: str) -> None:
    """Checkpoints of a random model at W4A8 and W8A8, as recipe ditas lays them out; smoothing factors and branches are random too."""
    for bits in (4, 8):
        path = folder / f"{name.replace('/', '-')}-W{bits}A8.safetensors"
        with suppress(UserError):
            header = checkpoint.read_header(path)
            if (header.recipe, header.format_version) == (RECIPE, checkpoint.FORMAT_VERSION):
                continue
        model = random_float(name)
        layers = {key: QuantizedLayer(without_branch(quantize_weight(linear.weight, adaln_spec(RECIPE.adaln_bits, linear.in_features))), None)
                  for key, linear in modulation_linears(model).items()}
        for key, linear in tqdm(block_linears(model).items(), desc=path.stem, unit="layer"):
            rows, columns = linear.weight.shape
            rank = max(1, round(min(rows, columns) * 32 / 1152))
            branch = (1e-5 * torch.randn(rows, rank)).bfloat16().float(), torch.randint(-127, 128, (rank, columns)).float()
            layers[key] = QuantizedLayer(LowRankWeight(quantize_weight(linear.weight, weight_spec(RECIPE, bits)), *branch),
                                         Activation(act_spec(RECIPE, 8)), torch.rand(columns) + 0.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = checkpoint.Header(model=name, image_size=256, num_classes=1000, weight_bit=bits, act_bit=8, recipe_name="ditas", recipe=RECIPE, seed=0,
                                   num_sampling_steps="50", svd="fast", alphas={})
        checkpoint.save(path, model, Result(layers), header)


def compiled(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile()
    return model


def torchao(name: str) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    model = random_float(name).to(DEVICE, torch.bfloat16)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return compiled(model)


def rows(folder: Path, name: str, dtype: torch.dtype) -> dict:
    """Name of a row to what loads its model, and the bits its weights take on disk (None: those of the file)."""
    def ours(bits: int, backend: str, packed: bool = False):
        return lambda: compiled(checkpoint.load(folder / f"{name.replace('/', '-')}-W{bits}A8.safetensors", DEVICE, True, backend, dtype, packed)[1])

    kind = str(dtype).removeprefix("torch.")
    made = {
        "float32": (lambda: random_float(name).to(DEVICE), 32),
        "bfloat16": (lambda: random_float(name).to(DEVICE, torch.bfloat16), 16),
        "bfloat16 compiled": (lambda: compiled(random_float(name).to(DEVICE, torch.bfloat16)), 16),
        "torchao int8 dynamic, bfloat16 compiled": (lambda: torchao(name), 8),
        f"ours simulated W4A8, {kind} compiled": (ours(4, "fake"), None),
        f"ours W8A8, {kind} compiled": (ours(8, "integer"), None),
        f"ours W4A8, {kind} compiled": (ours(4, "integer"), None),
    }
    if DEVICE.type == "cpu":
        made[f"ours W4A8 packed, {kind} compiled"] = ours(4, "integer", True), None
    return made


def inputs(batch: int, size: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(batch, 4, size, size).to(DEVICE), torch.full((batch,), 500, device=DEVICE), (torch.arange(batch) % 1000).to(DEVICE)


def tensor_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's, of several tensors
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def weight_bytes(model: nn.Module) -> int:
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return sum(map(tensor_bytes, tensors.values()))


def peak_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measure(load, batch: int) -> dict:
    """Weight bytes, and the peak of memory during a forward pass, in this process."""
    model = load()
    arguments = inputs(batch, model.input_size)
    model(*arguments)  # compiles
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading left over
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    model(*arguments)
    return {"weights": weight_bytes(model), "peak": peak_bytes()}


def timed(model: nn.Module, arguments: tuple) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(*arguments)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    prepare(folder, args.model)
    dtype = getattr(torch, args.dtype)
    table = rows(folder, args.model, dtype)
    if args.row is not None:
        print(json.dumps(measure(table[args.row][0], args.batch[0])))
        return
    processor = torch.cuda.get_device_name() if DEVICE.type == "cuda" else next(
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    print(f"PyTorch {torch.__version__}, {processor}, {torch.get_num_threads()} threads, VNNI {torch.cpu._is_vnni_supported()}, "
          f"AMX {torch.cpu._is_amx_tile_supported()}; {args.model} at 256 pixels, random weights")
    with torch.device("meta"):
        parameters = sum(each.numel() for each in DiT_models[args.model].build(256).state_dict().values())
    memory = {}
    for row in table:
        command = [sys.executable, __file__, "--row", row, "--model", args.model, "--dtype", args.dtype, "--folder", args.folder, "--batch", str(args.batch[0])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            memory[row] = json.loads(done.stdout.strip().splitlines()[-1])
        else:
            print(f"left out: {row}: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]}")
    models = {row: table[row][0]() for row in memory}
    for batch in args.batch:
        arguments = inputs(batch, next(iter(models.values())).input_size)
        for model in models.values():
            model(*arguments)
        times = {row: [] for row in models}
        for _ in tqdm(range(args.rounds), desc=f"batch {batch}", unit="round"):
            for row, model in models.items():
                times[row].append(timed(model, arguments))
        median = {row: statistics.median(values) for row, values in times.items()}
        base, float32 = (median.get(row, float("nan")) for row in ("bfloat16 compiled", "float32"))
        peak = f"peak memory (batch {args.batch[0]}), MB"
        print(f"\n| batch {batch} | ms per forward | / bfloat16 compiled | / float32 | {peak} | weights, MB | on disk, MB |\n|---|---|---|---|---|---|---|")
        for row, value in median.items():
            bits = table[row][1]
            name = f"{args.model.replace('/', '-')}-W{8 if 'W8' in row else 4}A8.safetensors"
            disk = (folder / name).stat().st_size if bits is None else parameters * bits / 8
            print(f"| {row} | {1000 * value:.0f} | {value / base:.2f} | {value / float32:.2f} | "
                  f"{memory[row]['peak'] / 1e6:.0f} | {memory[row]['weights'] / 1e6:.0f} | {disk / 1e6:.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-XL/2", choices=DiT_models)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 32, 128] if DEVICE.type == "cuda" else [2, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of our rows (default: bfloat16 where the processor multiplies it)",
                        default="bfloat16" if DEVICE.type == "cuda" or torch.cpu._is_avx512_bf16_supported() else "float32")
    parser.add_argument("--folder", default="results/inference")
    parser.add_argument("--row", help="only print the memory of this row, as JSON")
    keep_freed_memory()  # as the scripts do
    with torch.no_grad():
        main(parser.parse_args())
