"""Which parts of recipes go together, and what they see of the trajectory."""
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import noise_drive, random_model, relative, scope_linears
from torch import Tensor, nn

from architectures.registry import architecture_of
from cli.recipe_flags import FLAGS, build_recipe
from config import RECIPES, Recipe
from errors import Setting, SettingError, UserError, as_flag
from evaluation.judge import Judge
from quant.calibration.observers import ImageMaxima, Samples, StepSamples, pick
from quant.calibration.trajectory import record, replay
from quant.calibration.watch import Observer, Watch
from quant.numerics.tokens import matrix
from quant.pipeline import quantize_model
from quant.recipe import CONFLICTS, OR, BitWidths, check_recipe
from quant.refinement.allocation import GroupSearch
from QuantDiT import make_parser

STEPS, IMAGES = 6, 3
W4A8 = BitWidths(4, 8)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_sound(name):
    check_recipe(RECIPES[name], 8)


# Recipes, changes of theirs that do not go together, and what is told to the command line.
WRONG = (
    ("rtn", {"weight_scales": "two-level"}, "--weight-granularity group"),
    ("rtn", {"weight_granularity": "group"}, "--group-size"),
    ("rtn", {"weight_granularity": "strided"}, "--group-size"),
    ("rtn", {"act_granularity": "group", "weight_group": 32}, "--weight-granularity group"),
    ("rtn", {"act_range": "static"}, "--act-granularity tensor"),
    ("ditas", {"attention": "uniform"}, "--act-range static"),
    ("ditas", {"act_steps": "normal"}, "--act-range static"),
    ("repq-vit", {"act_steps": "each"}, "--act-steps embedding"),
    ("repq-vit", {"act_clip": "search"}, "--act-clip percentile"),
    ("ptq4dit", {"attention": "log-sqrt2", "act_clip": "search"}, "--act-clip percentile"),
    ("rtn", {"balance": "reparameterise"}, "--act-range static"),
    ("ditas", {"act_range": "static", "act_granularity": "tensor"}, "--alpha"),
    ("rtn", {"balance": "tas"}, "--alpha"),
    ("ditas-published", {"weight": "gptq"}, "--weight nearest"),
    ("rtn", {"weight": "gptq", "weight_granularity": "strided", "weight_group": 32},
     "--weight-granularity"),
    ("ditas", {"weight": "adaround"}, "--lowrank 0"),
    ("ditas", {"weight_range": "shrink"}, "--weight-scales float"),
    ("ditas-published", {"metric": "output"}, "--lowrank-metric weight"),
    ("rtn", {"tuning": 1}, "--weight-scales two-level"),
    ("rtn", {"group_sizes": (32,)}, "--weight-granularity group"),
    *(("ditas", {"scope": scope}, "scope but blocks quantises adaLN modulation already: "
       "give --adaln-weight-bit 16") for scope in ("adaln", "inner", "all")),
    ("ditas", {"group_tail": "allow"}, "--weight-scales float"),
    ("qdit", {"group_tail": "allow", "weight_range": "shrink"}, "--group-tail refuse"),
    ("qdit", {"allocate": "ilp", "act_range": "static", "act_granularity": "tensor"},
     "--act-range dynamic"),
)


def refusal(recipe: Recipe) -> SettingError | None:
    """Return the error that a recipe is refused with; None: it is not."""
    try:
        check_recipe(recipe, 8)
    except SettingError as error:
        return error
    return None


@pytest.mark.parametrize("name, changes, advice", WRONG)
def test_parts_that_do_not_go_together_are_refused(name, changes, advice):
    message = refusal(replace(RECIPES[name], **changes)).spelled(as_flag)
    assert "do not go together" in message and advice in message


@pytest.mark.parametrize("name, changes, advice", WRONG)
def test_whoever_follows_the_advice_meets_this_refusal_no_more(name, changes, advice):
    recipe = replace(RECIPES[name], **changes)
    before = refusal(recipe)
    ways = [()]
    for part in before.args[1:]:
        ways = [*ways, ()] if part == OR else [*ways[:-1], (*ways[-1], part)]
    flags = {flag.setting.name: flag for flag in FLAGS}
    for way in ways:
        settings = [part for part in way if isinstance(part, Setting)]
        if not all(setting.values for setting in settings):
            # A value of the user's choice.
            continue
        values = {flags[setting.name].field: flags[setting.name].values.read(
            str(setting.values[0]), setting) for setting in settings}
        assert str(refusal(replace(recipe, **values))) != str(before)


def test_every_setting_in_a_message_is_a_flag():
    known = {flag.setting.name for flag in FLAGS} | {"act_bit"}
    told = [*(conflict.instead for conflict in CONFLICTS), *(flag.needs.requires for flag in FLAGS)]
    settings = [part for parts in told for part in parts if isinstance(part, Setting)]
    assert {setting.name for setting in settings} <= known
    flags = {flag.setting.name: flag for flag in FLAGS}
    for setting in settings:
        for value in setting.values:
            flags[setting.name].values.read(str(value), setting)
    assert not any("--" in part for parts in told for part in parts if isinstance(part, str))
    assert not any("--" in conflict.because for conflict in CONFLICTS)


def test_help_lists_what_can_be_chosen():
    text = " ".join(make_parser().format_help().split())
    for choice in ("--weight {nearest,gptq,adaround}", "--scope {blocks,adaln,inner,all}",
                   "--zero-point {free,clamped,widened}", "--adaln-weight-bit {4,8,16}",
                   "--lowrank N|paper"):
        assert choice in text
    for flag in FLAGS:
        if flag.values.metavar.startswith("{"):
            for value in flag.values.metavar.strip("{}").split(","):
                flag.values.read(value, flag.setting)
    assert "VALUE" not in text


def test_every_part_has_a_flag_and_every_flag_its_part():
    parts = set(RECIPES["rtn"].__dataclass_fields__)
    flagged = {flag.field for flag in FLAGS}
    assert flagged <= parts
    assert len(flagged) == len(FLAGS)
    # Those without a flag are of the published code only.
    assert parts - flagged == {"rounds", "keep", "order"}


def test_flags_change_the_parts_of_a_recipe():
    arguments = [
        "--recipe", "rtn",
        "--balance", "tas",
        "--alpha", "0.5",
        "--weight", "gptq",
        "--group-sizes", "32/64",
        "--lowrank", "paper",
        "--act-granularity", "token",
        "--zero-point", "free",
    ]
    recipe = build_recipe(make_parser().parse_args(arguments))
    assert recipe == replace(
        RECIPES["rtn"],
        balance="tas",
        alphas=(0.5,),
        weight="gptq",
        group_sizes=(32, 64),
        rank=None,
        act_granularity="token",
        convention="free")


@pytest.mark.parametrize("arguments, message", [
    (["--alpha", "1.5"], "--alpha '1.5'"),
    (["--weight", "up"], "--weight up is not available"),
    (["--group-sizes", "32,x"], "--group-sizes '32,x'"),
    (["--iterations", "many"], "--iterations 'many'"),
    (["--lowrank", "-2"], "--lowrank -2"),
    (["--scope", "final"], "expected one of blocks, adaln, inner, all"),
    (["--zero-point", "affine"], "expected one of free, clamped, widened"),
    (["--recipe", "qdit", "--judge-cfg-scale", "0.5"], "--judge-cfg-scale 0.5 is too small"),
    (["--recipe", "qdit", "--allocate", "ilp", "--population", "4"], "--allocate evolution"),
    (["--hessian", "sequential"], "it is for --weight gptq"),
    (["--adaln-input", "float"], "it is for --scope adaln, inner or all"),
])
def test_a_wrong_part_is_named(arguments, message):
    with pytest.raises(UserError) as caught:
        build_recipe(make_parser().parse_args(arguments))
    assert message in caught.value.spelled(as_flag)


def test_scopes_hold_what_they_say():
    model = random_model()
    blocks = set(scope_linears(model, "blocks"))
    adaln = set(scope_linears(model, "adaln"))
    everything = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            everything.add(name)
    assert len(blocks) == 8
    assert len(adaln - blocks) == 2
    assert set(scope_linears(model, "all")) == everything
    ends = {"x_embedder.proj", "final_layer.linear"}
    assert set(scope_linears(model, "inner")) == everything - ends


def keep_inputs(linears: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    """Note every input of some linears, in lists that grow."""
    inputs = {name: [] for name in linears}

    def hook_of(name):
        return lambda module, args, output: inputs[name].append(args[0])

    for name, linear in linears.items():
        linear.register_forward_hook(hook_of(name))
    return inputs


def replay_to(
    new_observer: Callable[[], Observer], tokens: int
) -> tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, Observer]]:
    """Record a trajectory, and replay it to an observer of every linear of a small model.

    Returns:
        The linears, their inputs (steps, 2N, ...) while the model sampled, and their observers.
    """
    model = random_model()
    linears = scope_linears(model, "all")
    inputs = keep_inputs(linears)
    drive = noise_drive(STEPS, torch.arange(IMAGES))
    trajectory, _ = record(model, architecture_of(model).sites(model, "all"), drive)
    straight = {name: torch.stack(parts[:STEPS]) for name, parts in inputs.items()}
    watch = Watch()
    observers = {name: watch.add(name, "test", new_observer) for name in linears}
    replay(model, trajectory, watch, tokens, "test")
    return linears, straight, observers


class InputsAndOutputs:
    """Samples a linear's inputs, four tokens of each input, and its outputs."""

    def __init__(self, picks: Tensor):
        self.inputs = Samples(picks)
        self.four_tokens = Samples(picks, 4)
        self.outputs = Samples(picks)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.inputs(x, y)
        self.four_tokens(x, y)
        self.outputs(y, y)


@pytest.mark.parametrize("tokens", [1, 300])
def test_samples_are_the_inputs_and_outputs_at_the_picked_images(tokens):
    picks = pick(STEPS, 2 * IMAGES, 20, "uniform")
    linears, straight, observers = replay_to(lambda: InputsAndOutputs(picks), tokens)
    for name in ("blocks.1.mlp.fc2", "t_embedder.mlp.2", "final_layer.linear"):
        observer, linear = observers[name], linears[name]
        inputs = observer.inputs.value
        expected = torch.stack([straight[name][step, image] for step, image in picks])
        # A vector per image is a single token.
        expected = expected if expected.dim() == 3 else expected.unsqueeze(1)
        assert torch.allclose(inputs, expected, atol=1e-5)
        four = inputs[:, ::4][:, :4] if expected.shape[1] > 1 else inputs
        assert torch.equal(observer.four_tokens.value, four)
        outputs = F.linear(expected, matrix(linear), linear.bias)
        assert relative(observer.outputs.value, outputs) < 1e-6

    patches, embedder = observers["x_embedder.proj"], linears["x_embedder.proj"]
    assert patches.inputs.value.shape == (20, 16, 16)
    # Inputs of several hundred cancel in single outputs: rounding errors are those of the whole.
    outputs = F.linear(patches.inputs.value, matrix(embedder), embedder.bias)
    assert relative(patches.outputs.value, outputs) < 1e-6


def test_maxima_are_those_of_the_inputs():
    _, straight, maxima = replay_to(ImageMaxima, 100)
    name = "blocks.0.attn.proj"
    expected = straight[name].abs().amax(2).flatten(0, 1)
    assert torch.allclose(maxima[name].value, expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 300])
def test_samples_of_steps_are_drawn_from_all_images(tokens):
    _, straight, observers = replay_to(lambda: StepSamples(40), tokens)
    # A vector per image: all of them are kept.
    for name in ("blocks.0.adaLN_modulation.1", "t_embedder.mlp.0"):
        assert torch.allclose(observers[name].value, straight[name], atol=1e-5)
    # Of the tokens, 40 different ones: the same at every step, of every image.
    name = "blocks.1.mlp.fc2"
    samples = observers[name].value
    inputs = straight[name].flatten(1, 2)
    assert samples.shape == (STEPS, 40, 256)
    distances = torch.cdist(samples.double(), inputs.double())
    assert distances.amin(2).max() < 1e-4
    places = distances.argmin(2)
    assert (places == places[0]).all()
    assert len(places[0].unique()) == 40
    assert set((places[0] // 16).tolist()) == set(range(2 * IMAGES))


class Normal:
    """The normal distribution of PTQ4DM's diffusion time, cut into steps."""

    def __init__(self, steps: int):
        self._steps = steps

    def below(self, step: int) -> float:
        """Compute the probability of a time before a step, counted from the clean image."""
        return 0.5 * (1 + math.erf((step / self._steps - 0.4) / 0.4 / math.sqrt(2)))

    def shares(self) -> np.ndarray:
        """Compute how often each step is drawn, the noisiest first: truncated, and cut to ends."""
        inside = [self.below(step) for step in range(1, self._steps)]
        return np.diff([0.0, *inside, 1.0])[::-1]


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_ptq4dm_draws_steps_as_its_code_does(steps):
    """The share of every step is that of the truncated normal distribution, in closed form."""
    draws = 20_000
    picks = pick(steps, 32, draws, "normal").numpy()
    counts = np.bincount(picks[:, 0], minlength=steps)
    shares = Normal(steps).shares()
    deviations = np.sqrt(draws * shares * (1 - shares))
    assert (np.abs(counts - draws * shares) < 4.5 * deviations).all()


def test_ptq4dm_draws_as_many_of_the_ends_as_was_counted_of_its_code():
    """Of 4096 draws over 50 steps, 17.5 % were at the clean end and 6.9 % at the noisy one."""
    counts = np.bincount(pick(50, 32, 4096, "normal")[:, 0], minlength=50) / 4096
    # Two draws of 4096 differ by 0.8 % and 0.6 % (one deviation).
    assert counts[49] == pytest.approx(0.175, abs=0.02)
    assert counts[0] == pytest.approx(0.069, abs=0.015)
    assert counts[1:49].max() < 0.03


@pytest.mark.parametrize("spread", ["normal", "uniform"])
def test_picks_are_sorted_and_of_all_images(spread):
    steps, images = pick(50, 32, 20_000, spread).numpy().T
    assert (np.diff(steps) >= 0).all()
    assert images.min() == 0
    assert images.max() == 31
    if spread == "uniform":
        assert np.array_equal(np.bincount(steps), np.full(50, 400))


def small_fc2_large_elsewhere(quantised: nn.Module) -> float:
    """Judge a model by its group sizes: small ones are liked in fc2 and large ones elsewhere."""
    score = 0
    for name, module in quantised.named_modules():
        if not hasattr(getattr(module, "act", None), "spec"):
            continue
        size = module.act.spec.group
        score += size / 32 if name.endswith("fc2") else -size / 32
    return score


def test_group_sizes_are_chosen_by_the_judge(tmp_path):
    """A judge that likes small groups in one kind of layer gets them, within the constraint."""
    model = random_model(hidden_size=128, num_heads=4)
    recipe = replace(
        RECIPES["qdit"], scope="adaln", adaln_input="quantised", weight="nearest", population=16,
        generations=8)
    judge = Judge(small_fc2_large_elsewhere, "test")
    result = quantize_model(
        model, recipe, W4A8, noise_drive(2, torch.arange(2)),
        search=GroupSearch(judge, tmp_path / "found.json"))
    assert result.groups.keys() == result.layers.keys()
    for name, layer in result.layers.items():
        assert result.groups[name] == (32 if name.endswith("fc2") else 128)
        assert layer.weight.base.spec.group == result.groups[name]
        assert layer.act.spec.group == result.groups[name]
    best = [generation.best for generation in result.evolution]
    assert best == sorted(best, reverse=True)


def test_group_sizes_that_divide_nothing_are_refused():
    recipe = replace(RECIPES["qdit"], group_sizes=(7,), weight="nearest", weight_group=64)
    with pytest.raises(ValueError, match="none of the group sizes"):
        quantize_model(
            random_model(), recipe, W4A8, noise_drive(1, torch.arange(1)),
            search=GroupSearch(Judge(lambda _: 0.0, "test")))


@pytest.mark.parametrize("changes, balanced", [
    ({"balance": "none"}, 0),
    ({"balance": "salience"}, 6),
    ({"balance": "salience-equal"}, 6),
    ({"scope": "all"}, 8),
])
def test_the_published_order_takes_other_parts_too(changes, balanced):
    model = random_model(hidden_size=128)
    recipe = replace(RECIPES["ditas-published"], rounds=1, rank=2, **changes)
    result = quantize_model(model, recipe, W4A8, noise_drive(2, torch.arange(2)))
    smoothings = [layer.smoothing for layer in result.layers.values()]
    assert sum(smoothing.factors is not None for smoothing in smoothings) == balanced
