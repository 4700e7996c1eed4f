"""How fast quantisation is against the published way, and what it costs in memory.

    python benchmarks/calibration.py                 # everything; the published way takes minutes
    python benchmarks/calibration.py --only lowrank

calibration  The whole quantisation of the digits model, ours and the published way. Ours samples
             and replays one trajectory for all layers. The published code samples one per layer,
             stores the layer's inputs and searches candidate by candidate. The recipe and the
             low-rank solver are equal.
alphas       How many α of ditas-published on the twin stay the same when its weights are disturbed
             by 1e-7, and when the search looks at all of 100 steps.
forward      A forward pass of DiT-B/2 with random weights, batch 8: fake-quantised against float.
lowrank      Ten alternations at rank 32: full SVDs against the warm-started solver.
gptq         GPTQ of a 1152 x 4608 layer.
memory       Tensors alive during calibration, and growth of the resident set, against the bound:
             float model + 25 x the largest activation of a layer.
"""
import json
import resource
import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.published import ACT_BITS, IMAGES, WEIGHT_BITS, published_procedure
from benchmarks.sections import run_sections, timed
from benchmarks.subjects import (
    Start,
    block_linears,
    calibration_start,
    load_bundled,
)
from cards import DiT_models
from config import RECIPES, Recipe
from diffusion import Schedule, make_schedule
from models import DiT, build_model
from quant.activations.quantisers import Activation
from quant.install import install
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.numerics.spec import QuantSpec
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths, act_spec, weight_spec
from quant.weights.low_rank import lowrank_quantize, without_branch
from quant.weights.rounding import gptq_quantizer, nearest_quantizer, quantize_weight

STEPS = 50  # of a calibration trajectory


def calibration() -> None:
    schedule = make_schedule(str(STEPS))
    model = load_bundled()
    print("\n| recipe | published way, s | ours, s (once before, twice after) "
          "| ratio to the median | same α | losses agree to |")
    print("|---|---|---|---|---|---|")
    for name in ("ditas-published", "ditas"):
        recipe = RECIPES[name]
        ours = partial(calibrate, model, recipe, schedule)
        result, first = timed(ours)
        (alphas, losses), slow = timed(partial(published_procedure, model, recipe, schedule))
        _, second = timed(ours)
        _, third = timed(ours)
        times = [first, second, third]
        seconds = " / ".join(f"{t:.1f}" for t in times)
        ratio = slow / statistics.median(times)
        same = sum(result.alphas[layer] == alpha for layer, alpha in alphas.items())
        worst = max(largest_difference(result.losses[layer], losses[layer]) for layer in losses)
        print(f"| {name} | {slow:.1f} | {seconds} | {ratio:.1f}x | {same} of {len(alphas)} "
              f"| {worst:.1e} |", flush=True)


def alphas() -> None:
    model = load_bundled("DiT-Digits-Outliers")
    recipe = RECIPES["ditas-published"]
    bits = BitWidths(WEIGHT_BITS, ACT_BITS)

    def chosen(model: DiT, recipe: Recipe, steps: int, svd: str) -> dict[str, float]:
        drive = calibration_start(model, IMAGES).drive(make_schedule(str(steps)))
        return quantize_model(model, recipe, bits, drive, svd).alphas

    def same(a: dict[str, float], b: dict[str, float]) -> str:
        return f"{sum(a[name] == b[name] for name in a)} of {len(a)}"

    print("\n| ditas-published | α that stay the same |")
    print("|---|---|")
    expected = chosen(model, recipe, STEPS, "exact")
    for seed in range(3):
        found = chosen(disturbed(model, seed), recipe, STEPS, "exact")
        print(f"| weights disturbed by 1e-7, seed {seed} | {same(expected, found)} |", flush=True)
    short = chosen(model, recipe, 2 * STEPS, "fast")
    whole = chosen(model, replace(recipe, search_steps="all"), 2 * STEPS, "fast")
    print(f"| {2 * STEPS} steps, --search-steps all | {same(short, whole)} |", flush=True)


def disturbed(model: DiT, seed: int) -> DiT:
    """Copy a model, with a relative error of 1e-7 in the weights that are quantised."""
    model = deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for linear in block_linears(model).values():
        noise = torch.randn(linear.weight.shape, generator=generator)
        linear.weight.data.mul_(1 + 1e-7 * noise)
    return model


def calibrate(
    model: DiT,
    recipe: Recipe,
    schedule: Schedule,
    start: Start | None = None,
) -> Result:
    """Quantise the way this repository does; None starts the trajectory afresh."""
    if start is None:
        start = calibration_start(model, IMAGES)
    bits = BitWidths(WEIGHT_BITS, ACT_BITS)
    return quantize_model(model, recipe, bits, start.drive(schedule))


def largest_difference(values: Tensor, expected: Tensor) -> float:
    """Return the largest relative difference of two lists of losses."""
    return ((values - expected) / expected).abs().max().item()


def build_base() -> DiT:
    torch.manual_seed(0)
    return build_model(DiT_models["DiT-B/2"], 256).eval()


def fake_quantised(model: DiT, recipe: Recipe) -> DiT:
    """Install layers that compute as the recipe's do, without calibration."""
    spec = weight_spec(recipe, WEIGHT_BITS)
    act = Activation(act_spec(recipe, ACT_BITS))
    layers = {}
    for name, linear in block_linears(model).items():
        # Only fc2 divides its input when sampling; the factors of the others are folded.
        divides = recipe.balance != "none" and name.endswith("fc2")
        factors = torch.ones(linear.in_features) if divides else None
        weight = without_branch(quantize_weight(linear.weight, spec))
        layers[name] = QuantizedLayer(weight, act, Smoothing(factors))
    return install(model, layers)


@torch.inference_mode()
def forward() -> None:
    model = build_base()
    inputs = torch.randn(8, 4, 32, 32), torch.full((8,), 500), torch.arange(8)
    print("\n| recipe (W4A8) | float, ms | fake-quantised, ms | ratio (median of pairs) |")
    print("|---|---|---|---|")
    for name in ("rtn", "ditas", "ditas-published"):
        quantised = fake_quantised(build_base(), RECIPES[name])
        pairs = []
        for _ in range(9):
            _, before = timed(partial(model, *inputs))
            _, after = timed(partial(quantised, *inputs))
            pairs.append((before, after))
        pairs = pairs[2:]  # the first calls prepare
        before = statistics.median(pair[0] for pair in pairs) * 1e3
        after = statistics.median(pair[1] for pair in pairs) * 1e3
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        print(f"| {name} | {before:.0f} | {after:.0f} | {ratio:.2f} |", flush=True)


def lowrank() -> None:
    print("\n| layer | exact, s | fast, s | ratio | error of fast above exact |")
    print("|---|---|---|---|---|")
    quantizer = nearest_quantizer(QuantSpec(4, "group", 64))
    for rows, columns in ((1152, 1152), (1152, 4608), (4608, 1152)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
        seconds = {}
        errors = {}
        for solver in ("fast", "exact", "fast"):  # the first call warms up
            solve = partial(lowrank_quantize, weight, quantizer, 32, 10, "best", solver)
            result, seconds[solver] = timed(solve)
            errors[solver] = (weight - result.dense()).norm().item()
        ratio = seconds["exact"] / seconds["fast"]
        excess = errors["fast"] / errors["exact"] - 1
        print(f"| {rows} x {columns} | {seconds['exact']:.1f} | {seconds['fast']:.2f} "
              f"| {ratio:.1f}x | {excess:+.3%} |", flush=True)


def gptq() -> None:
    rows, columns = 1152, 4608
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    x = torch.randn(2 * columns, columns, generator=generator)
    hessian = x.T @ x
    print("\n| GPTQ of 1152 x 4608, W4, groups of 64 | factor, s | scales and rounding, s "
          "| output error over nearest |")
    print("|---|---|---|---|")
    for label, convention in (("float scales", "affine"), ("two-level", "two-level")):
        spec = QuantSpec(4, "group", 64, convention)
        quantizer, factor_seconds = timed(partial(gptq_quantizer, spec, hessian))
        result, seconds = timed(partial(quantizer, weight))
        error = output_error(x, result.dequantize(), weight)
        nearest = output_error(x, quantize_weight(weight, spec).dequantize(), weight)
        print(f"| {label} | {factor_seconds:.2f} | {seconds:.2f} | {error / nearest:.3f} |",
              flush=True)


def output_error(x: Tensor, quantised: Tensor, weight: Tensor) -> float:
    """Return the norm of what a quantised weight (O, I) changes for inputs (N, I)."""
    return (x @ (quantised - weight).T).norm().item()


@dataclass(frozen=True)
class Calibrated:
    """A model that was calibrated once, and the megabytes that this took."""

    name: str
    model: DiT
    start: Start
    weights: float  # of the float model
    activation: float  # the largest of a layer
    growth: float  # of the largest resident set


def memory() -> None:
    # Library code should be in memory before.
    tiny = DiT(input_size=8, hidden_size=64, depth=1, num_heads=2, num_classes=10).eval()
    calibrate(tiny, RECIPES["ditas"], make_schedule("2"))

    # Resident sets first, because the profiler takes memory.
    models = [calibrate_once("DiT-Digits", 16, "50"), calibrate_once("DiT-S/4", 256, "2")]
    print("\n| model | float model, MB | largest activation of a layer, MB | bound, MB "
          "| model and tensors alive at the peak (4 steps), MB | growth of the resident set, MB |")
    print("|---|---|---|---|---|---|")
    for run in models:
        schedule = make_schedule("4")
        again = partial(calibrate, run.model, RECIPES["ditas"], schedule, run.start)
        alive = run.weights + alive_at_peak(again)
        bound = run.weights + 25 * run.activation
        print(f"| {run.name} | {run.weights:.0f} | {run.activation:.1f} | {bound:.0f} "
              f"| {alive:.0f} | {run.growth:.0f} |", flush=True)


def calibrate_once(name: str, image_size: int, steps: str) -> Calibrated:
    """Build a model with random weights, and measure how the resident set grows."""
    card = DiT_models[name]
    torch.manual_seed(0)
    model = build_model(card, image_size).eval()
    start = calibration_start(model, IMAGES)
    before = largest_resident_mb()
    calibrate(model, RECIPES["ditas"], make_schedule(steps), start)
    growth = largest_resident_mb() - before

    weights = 4 * sum(p.numel() for p in model.parameters()) / 1e6
    tokens = 2 * IMAGES * (model.input_size // model.patch_size) ** 2  # with and without label
    activation = 4 * tokens * 4 * card.hidden_size / 1e6  # the input of fc2, float32
    return Calibrated(name, model, start, weights, activation, growth)


def largest_resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alive_at_peak(call: Callable[[], object]) -> float:
    """Return the megabytes of tensors that ``call`` held at once, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory_events = [event for event in events if event.get("name") == "[memory]"]
    return max(event["args"]["Total Allocated"] for event in memory_events) / 1e6


if __name__ == "__main__":
    run_sections(__doc__, {
        "memory": memory,
        "lowrank": lowrank,
        "gptq": gptq,
        "forward": forward,
        "calibration": calibration,
        "alphas": alphas,
    })
