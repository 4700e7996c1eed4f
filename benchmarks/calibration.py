"""How fast quantisation is, against the same recipe done the published way, and what it costs in memory.

    python benchmarks/calibration.py                 # everything; the published way alone takes minutes
    python benchmarks/calibration.py --only lowrank

calibration  whole quantisation of the digits model: one trajectory per layer, each layer's input history stored and searched
             candidate by candidate (as the published code does), against two trajectories for all layers; same low-rank solver
forward      fake-quantised against float forward of a DiT-B/2 with random weights, batch 8
lowrank      ten alternations of a 1152 x 4608 layer at rank 32: full SVDs against the warm-started solver
memory       tensors alive during calibration, and growth of the resident set, against float model + 25 x the largest layer activation
"""
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import config
from architectures.dit import block_linears
from benchmarks.sections import run_sections
from config import RECIPES
from diffusion import ImageNoise, guided_denoiser, make_schedule, sample
from download import load_model
from models import DiT, DiT_models
from quant.activations.quantisers import Activation
from quant.balancing.maxima import aggregate, smoothing_factors
from quant.calibration.trajectory import hooked, record
from quant.install import install
from quant.layers.quantised import QuantizedLayer
from quant.numerics.uniform import QuantSpec, fake_quantize
from quant.pipeline import Start, quantize_model
from quant.recipe import act_spec, weight_spec
from quant.weights.low_rank import lowrank_quantize, without_branch
from quant.weights.rounding import gptq_quantizer, nearest_quantizer, quantize_weight
from quant.weights.two_level import round_to_int8

STEPS, LABELS = 50, 16


def start(model) -> Start:
    noise = ImageNoise(0, range(LABELS), (model.in_channels, model.input_size, model.input_size))
    return Start(noise(), noise, torch.arange(LABELS) % model.num_classes)


@torch.no_grad()
def published_procedure(model, recipe, weight_bits, act_bits, schedule) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The same recipe with one trajectory per layer whose inputs are all stored, and every candidate a full product."""
    linears = block_linears(model)
    spec, act = weight_spec(recipe, weight_bits), act_spec(recipe, act_bits)
    alphas, losses = {}, {}
    bases = {}
    if recipe.order == "lowrank-first":
        for name, linear in linears.items():
            bases[name] = lowrank_quantize(linear.weight, nearest_quantizer(spec), config.lowrank_rank(recipe, min(linear.weight.shape)), recipe.rounds, recipe.keep, "fast")
    begin = start(model)
    _, absmax = record(model, linears, schedule, begin.labels, config.calibration_cfg_scale, begin.x, begin.draw)
    for name, linear in linears.items():
        history, begin = [], start(model)
        with hooked({name: linear}, lambda _, inputs, __: history.append(inputs)):
            sample(guided_denoiser(model, begin.labels, config.calibration_cfg_scale), schedule, begin.x, begin.draw)
        loss = torch.zeros(len(recipe.alphas), dtype=torch.float64)
        balanced = bases[name].weight.dequantize() if bases else linear.weight
        for i, alpha in enumerate(recipe.alphas):
            s = smoothing_factors(aggregate(absmax[name], recipe.balance, recipe.timestep), balanced, alpha, config.factor_floor)
            rounded = None if bases else round_to_int8(linear.weight * s, spec)
            for x in history:
                wanted = F.linear(x, linear.weight, linear.bias)
                q = fake_quantize(x / s, act)
                if bases:
                    weight, right = balanced * s, bases[name].right * s
                    got = F.linear(q, weight) + F.linear(F.linear(q, right), bases[name].left) + linear.bias
                else:
                    values, step = rounded
                    got = F.linear(q, values * step[:, None], linear.bias)
                loss[i] += (got - wanted).square().mean().double()
        losses[name] = loss
        alphas[name] = recipe.alphas[int(loss.argmin())]
        if not bases:
            s = smoothing_factors(aggregate(absmax[name], recipe.balance, recipe.timestep), balanced, alphas[name], config.factor_floor)
            weight, importance = linear.weight * s, (absmax[name] / s).square().mean(0)
            rank = config.lowrank_rank(recipe, min(weight.shape))
            lowrank_quantize(weight, nearest_quantizer(spec, importance), rank, recipe.rounds, recipe.keep, "fast").integer_branch(weight)
    return alphas, losses


def timed(call: Callable):
    begin = time.perf_counter()
    return call(), time.perf_counter() - begin


def calibration() -> None:
    schedule = make_schedule(str(STEPS))
    model = load_model("DiT-Digits", DiT_models["DiT-Digits"], 16, 10, None, torch.device("cpu"))
    print("\n| recipe | published way, s | ours, s (once before, twice after) | ratio to the median | same α | losses agree to |")
    print("|---|---|---|---|---|---|")
    for name in ("ditas-published", "ditas"):
        recipe = RECIPES[name]

        def ours():
            return quantize_model(model, recipe, 4, 8, schedule, start(model))
        result, first = timed(ours)
        (alphas, losses), slow = timed(lambda: published_procedure(model, recipe, 4, 8, schedule))
        times = [first, timed(ours)[1], timed(ours)[1]]
        worst = max(((result.losses[k] - losses[k]) / losses[k]).abs().max().item() for k in losses)
        same = sum(result.alphas[k] == alphas[k] for k in alphas)
        print(f"| {name} | {slow:.1f} | {' / '.join(f'{t:.1f}' for t in times)} | {slow / statistics.median(times):.1f}x | {same} of {len(alphas)} | {worst:.1e} |", flush=True)


@torch.inference_mode()
def forward() -> None:
    def build():
        torch.manual_seed(0)
        return DiT_models["DiT-B/2"].build(256).eval()
    model, quantised = build(), build()
    x, t, y = torch.randn(8, 4, 32, 32), torch.full((8,), 500), torch.arange(8)
    print("\n| recipe (W4A8) | float, ms | fake-quantised, ms | ratio (median of pairs) |")
    print("|---|---|---|---|")
    for name in ("rtn", "ditas", "ditas-published"):
        recipe, quantised = RECIPES[name], build()
        layers = {}
        for key, linear in block_linears(quantised).items():
            divides = recipe.balance != "none" and key.endswith("fc2")  # the others are folded when sampling
            layers[key] = QuantizedLayer(without_branch(quantize_weight(linear.weight, weight_spec(recipe, 4))), Activation(act_spec(recipe, 8)),
                                         torch.ones(linear.in_features) if divides else None)
        install(quantised, layers)
        pairs = []
        for i in range(9):
            pairs.append((timed(lambda: model(x, t, y))[1], timed(lambda: quantised(x, t, y))[1]))
        pairs = pairs[2:]
        a, b = (statistics.median(pair[k] for pair in pairs) * 1e3 for k in (0, 1))
        print(f"| {name} | {a:.0f} | {b:.0f} | {statistics.median(q / p for p, q in pairs):.2f} |", flush=True)


def lowrank() -> None:
    print("\n| layer | exact, s | fast, s | ratio | error of fast above exact |")
    print("|---|---|---|---|---|")
    spec = QuantSpec(4, "group", 64)
    for rows, columns in ((1152, 1152), (1152, 4608), (4608, 1152)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
        timings, errors = {}, {}
        for solver in ("fast", "exact", "fast"):
            result, timings[solver] = timed(lambda: lowrank_quantize(weight, nearest_quantizer(spec), 32, 10, "best", solver))
            errors[solver] = (weight - result.dense()).norm().item()
        print(f"| {rows} x {columns} | {timings['exact']:.1f} | {timings['fast']:.2f} | {timings['exact'] / timings['fast']:.1f}x "
              f"| {errors['fast'] / errors['exact'] - 1:+.3%} |", flush=True)


def gptq() -> None:
    rows, columns = 1152, 4608
    generator = torch.Generator().manual_seed(0)
    weight, x = 0.02 * torch.randn(rows, columns, generator=generator), torch.randn(2 * columns, columns, generator=generator)
    hessian = x.T @ x
    print("\n| GPTQ of 1152 x 4608, W4, groups of 64 | factor, s | scales and rounding, s | output error over nearest |")
    print("|---|---|---|---|")
    for convention in ("affine", "two-level"):
        spec = QuantSpec(4, "group", 64, convention)
        quantizer, scales = timed(lambda: gptq_quantizer(spec, hessian))
        result, seconds = timed(lambda: quantizer(weight))
        errors = [(x @ (each.dequantize() - weight).T).norm().item() for each in (result, quantize_weight(weight, spec))]
        print(f"| {'float scales' if convention == 'affine' else convention} | {scales:.2f} | {seconds:.2f} | {errors[0] / errors[1]:.3f} |", flush=True)


def alive_at_peak(call: Callable) -> float:
    """MB of tensors that ``call`` held at once, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]") / 1e6


def memory() -> None:
    tiny = DiT(input_size=8, hidden_size=64, depth=1, num_heads=2, num_classes=10).eval()
    quantize_model(tiny, RECIPES["ditas"], 4, 8, make_schedule("2"), start(tiny))  # so that library code is in memory before
    found = []
    for name, size, steps in (("DiT-Digits", 16, "50"), ("DiT-S/4", 256, "2")):
        card = DiT_models[name]
        torch.manual_seed(0)
        model = card.build(size).eval()
        begin = start(model)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quantize_model(model, RECIPES["ditas"], 4, 8, make_schedule(steps), begin)
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        weights = sum(p.numel() for p in model.parameters()) * 4 / 1e6
        activation = 2 * LABELS * (model.input_size // model.patch_size) ** 2 * card.hidden_size * 4 * 4 / 1e6
        found.append((name, model, begin, weights, activation, growth))
    print("\n| model | float model, MB | largest activation of a layer, MB | bound, MB | model and tensors alive at the peak (4 steps), MB | growth of the resident set, MB |")
    print("|---|---|---|---|---|---|")
    for name, model, begin, weights, activation, growth in found:  # after the resident sets, because recording takes memory
        alive = weights + alive_at_peak(lambda: quantize_model(model, RECIPES["ditas"], 4, 8, make_schedule("4"), begin))
        print(f"| {name} | {weights:.0f} | {activation:.1f} | {weights + 25 * activation:.0f} | {alive:.0f} | {growth:.0f} |", flush=True)


if __name__ == "__main__":
    run_sections(__doc__, {"memory": memory, "lowrank": lowrank, "gptq": gptq, "forward": forward, "calibration": calibration})
