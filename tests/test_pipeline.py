"""The whole published method against golden values, and how it gets its data."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    block_linears,
    golden,
    golden_model,
    random_model,
    relative,
    replayed,
)
from torch import nn

import config
from architectures.registry import architecture_of
from benchmarks.calibration import alive_at_peak
from config import RECIPES
from diffusion import ImageNoise, guided_denoiser, make_schedule, sample
from diffusion.generate import guided_drive
from download import load_model
from evaluation.metrics import sqnr_db
from models import DiT_models
from quant.activations.quantisers import Activation
from quant.calibration.trajectory import record, replay
from quant.calibration.watch import Watch
from quant.install import install
from quant.layers.fold import fold
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.numerics.tokens import matrix
from quant.numerics.uniform import QuantSpec, quantize, signed_codes
from quant.pipeline import quantize_model
from quant.recipe import BitWidths, act_spec, weight_spec
from quant.weights.low_rank import LowRankWeight
from quant.weights.rounding import quantize_weight

RECIPE = replace(RECIPES["ditas-published"], rank=4)
TIE = 1e-4  # of a code; float32 sums taken in another order move a value by about 1e-5


def start(values):
    """Noise to start from, noise for the steps, and labels, as they were recorded."""
    draw = replayed(values["noise"][:, :4])
    return torch.tensor(values["z"]), draw, torch.tensor(values["labels"])


@pytest.fixture(scope="module")
def published():
    with torch.no_grad():
        drive = guided_drive(make_schedule("50"), *start(golden("diffusion")), 1.5)
        return quantize_model(golden_model(), RECIPE, BitWidths(4, 8), drive, svd="exact")


def latents(model):
    values = golden("diffusion")
    x, draw, labels = start(values)
    return sample(guided_denoiser(model, labels, 1.5), make_schedule("50"), x, draw)


def test_every_intermediate_matches_golden(published):
    values = golden("ditas")
    assert len(published.layers) == 8
    for name, layer in published.layers.items():
        assert relative(published.absmax[name].amax(0), values[f"{name}/act_absmax"]) < 1e-5
        assert np.allclose(published.losses[name], values[f"{name}/alpha_loss"], rtol=1e-4, atol=0)
        assert published.alphas[name] == float(values[f"{name}/alpha"])
        assert relative(layer.smoothing.factors, values[f"{name}/scale"]) < 1e-5
        expected = values[f"{name}/quant_weight"] + values[f"{name}/lora_left"] @ values[f"{name}/right"]
        assert relative(layer.weight.dense(), expected) < 1e-4


class Undecided(nn.Module):
    """A dynamic quantiser that asks ``flip`` which way a value within ``TIE`` of a rounding tie falls."""

    def __init__(self, spec: QuantSpec, flip):
        super().__init__()
        self.spec, self.flip = spec, flip

    def forward(self, values):
        codes, scale, zero = signed_codes(values, self.spec)
        exact = values.double() / scale.double()
        below = exact.floor()
        tied = ((exact - below - 0.5).abs() < TIE) & (below < self.spec.top - zero)
        # The zero point is the rounded low end: it must not be undecided, too.
        assert not tied[values == values.amin()].any()
        for place in tied.nonzero():
            if self.flip():
                codes[tuple(place)] = 2 * below[tuple(place)] + 1 - codes[tuple(place)]
        return codes, scale


def every_way(run):
    """Yield ``run(flip)`` for every sequence of answers that ``flip`` can give in it, all False first."""
    pending = [[]]
    while pending:
        answers = pending.pop(0)
        asked = iter(answers)
        given = []

        def flip() -> bool:
            given.append(next(asked, False))
            return given[-1]

        yield run(flip)
        pending += [given[:i] + [True] for i in range(len(answers), len(given))]


def test_quantised_model_matches_golden_before_and_after_folding(published):
    values, inputs = golden("ditas"), [torch.tensor(golden("dit")[k]) for k in "xty"]
    for state, model in (("unmerged", install(golden_model(), published.layers)),
                         ("merged", folded(golden_model(), published.layers))):
        assert sqnr_db(torch.tensor(values[f"latents_{state}"]), latents(model)) > 90

        def run(flip, model=model):
            for module in model.modules():
                if isinstance(module, QuantLinear):
                    module.act = Undecided(module.act.spec, flip)
            return model(*inputs)

        # Up to five values lie within rounding error of a tie. How the recording processor rounded
        # them is unknown: one of the 8 to 20 ways must give its output (and does to 5e-7).
        assert any(relative(output, values[f"forward_{state}"]) < 1e-5 for output in every_way(run))
    assert sqnr_db(torch.tensor(values["latents_float"]), latents(golden_model())) > 90


def folded(model, layers):
    return install(model, fold(model, layers))


def golden_layers(weight_of) -> dict[str, QuantizedLayer]:
    """Layers whose effective weight is a recorded tensor, with the recorded factors (rank 0; the weight rides in ``left @ right``)."""
    values, model = golden("ditas"), golden_model()
    layers = {}
    for name, linear in block_linears(model).items():
        zeros = quantize(torch.zeros_like(linear.weight), QuantSpec(4, "channel"))
        weight = torch.tensor(weight_of(values, name))
        layers[name] = QuantizedLayer(LowRankWeight(zeros, torch.eye(len(weight)), weight), None, Smoothing(torch.tensor(values[f"{name}/scale"])))
    return layers


def test_folding_the_golden_tensors_gives_the_golden_merged_ones():
    values = golden("ditas")
    model = golden_model()
    quantised = fold(model, golden_layers(lambda v, n: v[f"{n}/quant_weight"]))
    low_rank = fold(golden_model(), golden_layers(lambda v, n: v[f"{n}/lora_left"] @ v[f"{n}/right"]))
    seen = 0

    def weight(layer):
        values, step, left, right = layer.factored()
        return values * step[:, None] + left @ right

    for key, expected in values.items():
        if not key.startswith("merged/"):
            continue
        name = key.removeprefix("merged/")
        if name.endswith("quant.weight"):
            got = weight(quantised[name.removesuffix(".quant.weight")])
        elif name.endswith("left.weight"):
            layer = name.removesuffix(".left.weight")
            got, expected = weight(low_rank[layer]), expected @ values[f"{layer}/right"]
        else:
            got = model.state_dict()[name]
        assert relative(got, expected) < 1e-5, name
        seen += 1
    assert seen == 12


def counted(model):
    calls = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_calibration_runs_at_most_two_trajectories(name):
    model, steps, n = random_model(depth=5), 6, 3
    noise = ImageNoise(0, range(n), (4, 8, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = counted(model)
    row = RECIPES[name]
    recipe = replace(row, alphas=row.alphas[:2], rounds=1, group_sizes=(), weight="gptq" if row.weight == "adaround" else row.weight)
    result = quantize_model(
        model, recipe, BitWidths(4, 8),
        guided_drive(make_schedule(str(steps)), noise(), noise, torch.arange(n), 1.5))
    assert sum(calls) == {"rtn": 0, "smoothquant": 1}.get(name, 2) * steps * 2 * n
    assert len(result.layers) == {"blocks": 20 if recipe.adaln_bits == 16 else 25, "adaln": 25, "all": 30}[recipe.scope]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_replay_shows_the_same_inputs_however_many_timesteps_go_at_once():
    model, n = random_model(), 2
    linears = block_linears(model)
    noise = ImageNoise(0, range(n), (4, 8, 8))
    recorded = []
    handle = linears["blocks.1.mlp.fc2"].register_forward_hook(lambda m, i, o: recorded.append((i[0], o)))
    drive = guided_drive(make_schedule("7"), noise(), noise, torch.tensor([3, 5]), 1.5)
    trajectory, absmax = record(model, architecture_of(model).sites(model, "blocks"), drive)
    handle.remove()
    for tokens in (1, 200, 10 ** 6):
        seen, watch = {name: [] for name in linears}, Watch()
        for name, pairs in seen.items():
            watch.add(name, "test", lambda pairs=pairs: (
                lambda x, y: pairs.append((x.clone(), y.clone()))))
        replay(model, trajectory, watch, tokens, "test")
        inputs, outputs = (torch.cat(parts) for parts in zip(*seen["blocks.1.mlp.fc2"]))
        assert relative(inputs, torch.stack([i for i, _ in recorded])) < 1e-5
        assert relative(outputs, torch.stack([o for _, o in recorded])) < 1e-5
        for name in linears:
            together = torch.cat([x for x, _ in seen[name]])
            assert together.shape[:2] == (7, 2 * n) and relative(together.abs().amax((1, 2)), absmax[name]) < 1e-5


def test_a_model_that_gives_nan_is_refused():
    model = random_model()
    model.blocks[1].mlp.fc1.bias[3] = float("nan")
    noise = ImageNoise(0, range(2), (4, 8, 8))
    with pytest.raises(ValueError, match="blocks.1.mlp.fc2 is not finite"):
        quantize_model(
            model, RECIPES["ditas"], BitWidths(4, 8),
            guided_drive(make_schedule("3"), noise(), noise, torch.arange(2), 1.5))


def random_layers(model, recipe, bits, act_bits):
    """Any factors, shifts, branches and static ranges where the recipe has them."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for site in architecture_of(model).sites(model, recipe.scope):
        name, weight = site.name, matrix(model.get_submodule(site.name))
        smooth, shift = None, None
        if recipe.balance != "none" and site.is_balanced:
            smooth = torch.exp(torch.randn(weight.shape[1], generator=generator))
            if recipe.balance == "reparameterise" and site.follows_norm:
                shift = torch.randn(weight.shape[1], generator=generator)
        smoothing = Smoothing(smooth, shift)
        quantised = quantize_weight(smoothing.of_weight(weight), weight_spec(recipe, bits))
        left, right = torch.randn(len(weight), 3, generator=generator), torch.randn(3, weight.shape[1], generator=generator)
        act = Activation(act_spec(recipe, act_bits, site.per_image))
        if recipe.act_range == "static":
            act = replace(act, scale=torch.tensor(0.05), zero=torch.tensor(120.0))
            if recipe.act_steps == "each" and site.per_image:
                act = replace(act, scale=torch.tensor([0.03, 0.05]), zero=torch.tensor([120.0, 9.0]), timesteps=torch.tensor([900, 10]))
        layers[name] = QuantizedLayer(LowRankWeight(quantised, 0.01 * left, 0.01 * right), act, smoothing)
    return layers


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_folding_changes_no_output(name):
    recipe = RECIPES[name]
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([5, 400, 900]), torch.tensor([0, 3, 10])
    for act_bits, bound in ((16, 1e-4), (8, 2e-2)):  # with rounding, a code may flip on a float32 tie
        layers = random_layers(random_model(), recipe, 4, act_bits)
        before = install(random_model(), layers)(x, t, y)
        model = folded(random_model(), layers)
        assert relative(model(x, t, y), before) < bound
        for block in model.blocks:
            assert block.attn.qkv.smooth is None and block.attn.proj.smooth is None and block.mlp.fc1.smooth is None
            assert block.attn.qkv.shift is None and block.mlp.fc1.shift is None
            assert (block.mlp.fc2.smooth is None) == (recipe.balance == "none")


@pytest.mark.parametrize("spec", [QuantSpec(4, "group", 32), QuantSpec(4, "group", 32, "two-level"), QuantSpec(4, "channel")])
def test_the_quantised_layer_is_the_papers_equation(spec):
    torch.manual_seed(0)
    weight, x, bias, smooth = torch.randn(24, 64), torch.randn(2, 5, 64), torch.randn(24), torch.rand(64) + 0.5
    quantised = quantize_weight(weight * smooth, spec)
    scale_of_weight = quantised.scale.reshape(24, -1, 1).double() * (1 if quantised.step is None else quantised.step[:, :, None].double())
    w_hat = ((quantised.codes.reshape(24, scale_of_weight.shape[1], -1).double() - quantised.zero.reshape(24, -1, 1)) * scale_of_weight).reshape(24, 64).numpy()
    left, right = torch.randn(24, 2), torch.randn(2, 64)
    out = QuantLinear(QuantizedLayer(LowRankWeight(quantised, left, right), Activation(QuantSpec(8, "token")), Smoothing(smooth)), bias)(x)
    rows = []
    for token in (x / smooth).reshape(-1, 64).double().numpy():
        low, high = min(token.min(), 0), max(token.max(), 0)
        scale = (high - low) / 255
        zero = round(-low / scale)
        q = (np.clip(np.round(token / scale) + zero, 0, 255) - zero) * scale
        rows.append(w_hat @ q + left.double().numpy() @ (right.double().numpy() @ q) + bias.double().numpy())
    assert relative(out.reshape(-1, 24), np.stack(rows)) < 1e-5


def test_default_labels_are_the_papers():
    assert config.default_labels(1000)[:3] == [207, 360, 387] and len(config.default_labels(1000)) == 16
    assert config.default_labels(10) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5]


def test_calibration_holds_no_more_than_25_activations_beside_the_model():
    model, n = load_model("DiT-Digits", DiT_models["DiT-Digits"], 16, 10, None, torch.device("cpu")), 16
    noise = ImageNoise(0, range(n), (4, 8, 8))
    largest = max(linear.in_features for linear in block_linears(model).values()) * 2 * n * 16 * 4 / 1e6  # MB: 16 tokens
    alive = alive_at_peak(lambda: quantize_model(
        model, RECIPES["ditas"], BitWidths(4, 8),
        guided_drive(make_schedule("4"), noise(), noise, torch.arange(n) % 10, 1.5)))
    assert largest < alive < 25 * largest
