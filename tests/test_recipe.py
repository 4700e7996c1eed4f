"""Which parts of recipes go together, and what they see of the trajectory."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, relative, scope_linears

from architectures.registry import architecture_of
from cli.recipe_flags import FLAGS, build_recipe
from config import RECIPES
from diffusion import ImageNoise, make_schedule
from diffusion.generate import guided_drive
from errors import UserError
from evaluation.judge import Judge
from quant.calibration.observers import ImageMaxima, Samples, StepRange, pick
from quant.calibration.trajectory import record, replay
from quant.calibration.watch import Watch
from quant.numerics.tokens import matrix
from quant.pipeline import quantize_model
from quant.recipe import BitWidths, check_recipe
from quant.refinement.allocation import GroupSearch
from QuantDiT import make_parser


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_sound(name):
    check_recipe(RECIPES[name], 8)


@pytest.mark.parametrize("name, changes, words", [
    ("rtn", {"weight_scales": "two-level"}, "--weight-granularity group"),
    ("rtn", {"weight_granularity": "group"}, "--group-size"),
    ("rtn", {"weight_granularity": "strided"}, "--group-size"),
    ("rtn", {"act_granularity": "group", "weight_group": 32}, "--weight-granularity group"),
    ("rtn", {"act_range": "static"}, "--act-granularity tensor"),
    ("ditas", {"attention": "uniform"}, "--act-range static"),
    ("ditas", {"act_steps": "normal"}, "--act-range static"),
    ("rtn", {"balance": "reparameterise"}, "--act-range static"),
    ("ditas", {"act_range": "static", "act_granularity": "tensor"}, "--alpha"),
    ("rtn", {"balance": "tas"}, "--alpha"),
    ("ditas-published", {"weight": "gptq"}, "--weight nearest"),
    ("rtn", {"weight": "gptq", "weight_granularity": "strided", "weight_group": 32}, "--weight-granularity"),
    ("ditas", {"weight": "adaround"}, "--lowrank 0"),
    ("ditas", {"weight_range": "shrink"}, "--weight-scales float"),
    ("ditas-published", {"metric": "output"}, "--lowrank-metric weight"),
    ("rtn", {"group_sizes": (32,)}, "--weight-granularity group"),
    ("ditas", {"scope": "adaln"}, "--adaln-weight-bit 16"),
])
def test_parts_that_do_not_go_together_are_refused(name, changes, words):
    with pytest.raises(ValueError, match="do not go together") as caught:
        check_recipe(replace(RECIPES[name], **changes), 8)
    assert words in str(caught.value)


def test_every_part_has_a_flag_and_every_flag_its_part():
    parts = {flag.field for flag in FLAGS}
    assert parts <= set(RECIPES["rtn"].__dataclass_fields__) and len(parts) == len(FLAGS)
    assert set(RECIPES["rtn"].__dataclass_fields__) - parts == {"convention", "rounds", "keep", "order"}  # of the published code only
    words = ["--recipe", "rtn", "--balance", "tas", "--alpha", "0.5", "--weight", "gptq", "--group-sizes", "32/64", "--lowrank", "paper", "--act-granularity", "token"]
    recipe = build_recipe(make_parser().parse_args(words))
    assert recipe == replace(RECIPES["rtn"], balance="tas", alphas=(0.5,), weight="gptq", group_sizes=(32, 64), rank=None, act_granularity="token")


@pytest.mark.parametrize("words, message", [
    (["--alpha", "1.5"], "--alpha '1.5'"), (["--weight", "up"], "--weight up is not available"), (["--group-sizes", "32,x"], "--group-sizes '32,x'"),
    (["--iterations", "many"], "--iterations 'many'"), (["--lowrank", "-2"], "--lowrank -2"), (["--scope", "final"], "expected one of blocks, adaln, all"),
])
def test_a_wrong_part_is_named(words, message):
    with pytest.raises(UserError, match=message):
        build_recipe(make_parser().parse_args(words))


def test_scopes_hold_what_they_say():
    model = random_model()
    names = {scope: set(scope_linears(model, scope)) for scope in ("blocks", "adaln", "all")}
    assert len(names["blocks"]) == 8 and len(names["adaln"] - names["blocks"]) == 2
    every = {name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    assert names["all"] == every


def recorded(observers, tokens):
    model, n = random_model(), 3
    linears = scope_linears(model, "all")
    noise = ImageNoise(0, range(n), (4, 8, 8))
    inputs = {name: [] for name in linears}
    for name, linear in linears.items():
        linear.register_forward_hook(lambda m, i, o, name=name: inputs[name].append(i[0]))
    drive = guided_drive(make_schedule("6"), noise(), noise, torch.arange(n), 1.5)
    trajectory, _ = record(model, architecture_of(model).sites(model, "all"), drive)
    straight = {name: torch.stack(parts[:6]) for name, parts in inputs.items()}  # (steps, 2N, ...)
    watch = Watch()
    made = {name: watch.add(name, "test", observers) for name in linears}
    replay(model, trajectory, watch, tokens, "test")
    return linears, straight, made


class Both:
    """All tokens, four of them, and outputs."""

    def __init__(self, picks):
        self.inputs, self.few, self.outputs = Samples(picks), Samples(picks, 4), Samples(picks)

    def __call__(self, x, y):
        self.inputs(x, y)
        self.few(x, y)
        self.outputs(y, y)


@pytest.mark.parametrize("tokens", [1, 300])
def test_samples_are_the_inputs_and_outputs_at_the_picked_images(tokens):
    picks = pick(6, 6, 20, "uniform")
    linears, straight, made = recorded(lambda: Both(picks), tokens)
    for name in ("blocks.1.mlp.fc2", "t_embedder.mlp.2", "final_layer.linear"):
        expected = torch.stack([straight[name][step, image] for step, image in picks])
        expected = expected if expected.dim() == 3 else expected.unsqueeze(1)
        assert torch.allclose(made[name].inputs.value, expected, atol=1e-5)
        assert torch.equal(made[name].few.value, made[name].inputs.value[:, ::4][:, :4] if expected.shape[1] > 1 else made[name].inputs.value)
        outputs = F.linear(expected, matrix(linears[name]), linears[name].bias)
        assert relative(made[name].outputs.value, outputs) < 1e-6
    patches, embed = made["x_embedder.proj"], linears["x_embedder.proj"]
    assert patches.inputs.value.shape == (20, 16, 16)
    # Inputs of several hundred cancel in single outputs: rounding errors are those of the whole.
    outputs = F.linear(patches.inputs.value, matrix(embed), embed.bias)
    assert relative(patches.outputs.value, outputs) < 1e-6


def test_maxima_and_ranges_are_those_of_the_inputs():
    _, straight, made = recorded(ImageMaxima, 100)
    name = "blocks.0.attn.proj"
    assert torch.allclose(made[name].value, straight[name].abs().amax(2).flatten(0, 1), atol=1e-5)
    _, straight, made = recorded(StepRange, 100)
    for name in ("blocks.0.adaLN_modulation.1", "t_embedder.mlp.0"):
        assert torch.allclose(made[name].low, straight[name].flatten(1).amin(1), atol=1e-5)
        assert torch.allclose(made[name].high, straight[name].flatten(1).amax(1), atol=1e-5)


def test_ptq4dm_draws_more_of_the_cleaner_steps():
    normal, uniform = (pick(50, 32, 20_000, spread).numpy() for spread in ("normal", "uniform"))
    assert np.array_equal(np.bincount(uniform[:, 0]), np.full(50, 400))
    counts = np.bincount(normal[:, 0], minlength=50)
    rng = np.random.default_rng(0)  # the same draw by the book: N(0.4, 0.4) stretched to [0, 1], 0 the clean end
    time = rng.normal(0.4, 0.4, 20_000)
    time = (time - time.min()) / (time.max() - time.min())
    assert abs(normal[:, 0].mean() - 49.5 + 50 * time.mean()) < 3 and counts.argmax() in range(17, 35) and counts[0] < 30
    for picks in (normal, uniform):
        assert (np.diff(picks[:, 0]) >= 0).all() and picks[:, 1].min() >= 0 and picks[:, 1].max() == 31


def test_group_sizes_are_chosen_by_the_judge(tmp_path):
    """A judge that likes small groups in one kind of layer and large ones elsewhere gets them, within the constraint."""
    model, n = random_model(hidden_size=128, num_heads=4), 2
    recipe = replace(RECIPES["qdit"], weight="nearest", population=16, generations=8)
    noise = ImageNoise(0, range(n), (4, 8, 8))

    def judge(quantised):
        sizes = {name: module.act.spec.group for name, module in quantised.named_modules() if hasattr(getattr(module, "act", None), "spec")}
        return sum(size / 32 if name.endswith("fc2") else -size / 32 for name, size in sizes.items())
    result = quantize_model(
        model, recipe, BitWidths(4, 8),
        guided_drive(make_schedule("2"), noise(), noise, torch.arange(n), 1.5),
        search=GroupSearch(Judge(judge, "test"), tmp_path / "found.json"))
    assert result.groups.keys() == result.layers.keys()
    assert all(result.groups[name] == (32 if name.endswith("fc2") else 128) for name in result.groups)
    for name, layer in result.layers.items():
        assert layer.weight.base.spec.group == layer.act.spec.group == result.groups[name]
    assert [each.best for each in result.evolution] == sorted((each.best for each in result.evolution), reverse=True)


def test_group_sizes_that_divide_nothing_are_refused():
    model, noise = random_model(), ImageNoise(0, range(1), (4, 8, 8))
    recipe = replace(RECIPES["qdit"], group_sizes=(7,), weight="nearest", weight_group=64)
    with pytest.raises(ValueError, match="none of the group sizes"):
        quantize_model(
            model, recipe, BitWidths(4, 8),
            guided_drive(make_schedule("1"), noise(), noise, torch.arange(1), 1.5),
            search=GroupSearch(Judge(lambda _: 0.0, "test")))


@pytest.mark.parametrize("changes", [{"balance": "none"}, {"balance": "salience"}, {"scope": "all"}])
def test_the_published_order_takes_other_parts_too(changes):
    model, noise = random_model(hidden_size=128), ImageNoise(0, range(2), (4, 8, 8))
    recipe = replace(RECIPES["ditas-published"], rounds=1, rank=2, **changes)
    result = quantize_model(
        model, recipe, BitWidths(4, 8),
        guided_drive(make_schedule("2"), noise(), noise, torch.arange(2), 1.5))
    smoothed = sum(layer.smoothing.factors is not None for layer in result.layers.values())
    assert smoothed == {"none": 0, "salience": 6}.get(changes.get("balance"), 8)
