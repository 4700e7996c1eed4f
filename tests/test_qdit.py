"""Q-DiT's parts: weights of 16 bits, inputs left alone, sequential Hessians, integer programs."""
import itertools
import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import checkpoint_header, noise_drive, random_model, relative
from safetensors.torch import load_file
from test_evolution import CHOICES, CONSTRAINTS
from torch import Tensor, nn

from architectures.registry import architecture_named, empty_model, registered_configuration
from architectures.sites import Site
from config import RECIPES, Recipe
from diffusion import ddim_step, make_schedule
from diffusion.generate import Sampling, generate_latents
from errors import UserError
from evaluation.judge import Judge, sqnr_judge
from evaluation.metrics import sqnr_db
from quant import checkpoint
from quant.activations.quantisers import Activation
from quant.calibration.trajectory import record
from quant.checkpoint.size import counted_bytes, float_bytes
from quant.install import install
from quant.integer.weight import integer_obstacle
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import NO_SMOOTHING
from quant.numerics.spec import OFF_BITS, QuantSpec
from quant.numerics.tokens import matrix
from quant.numerics.uniform import fake_quantize
from quant.parts import Task
from quant.pipeline import quantize_model
from quant.recipe import BitWidths, act_spec, weight_spec
from quant.refinement.allocation import GroupSearch
from quant.refinement.group_sizes import bit_ops, bit_ops_at_most, mean_at_least
from quant.refinement.integer_program import least_cost
from quant.refinement.sensitivity import hessian_error, output_error
from quant.refinement.sequential import QuantisedSoFar, stages_of
from quant.weights.floating import float_weight

W4A8, W16A8 = BitWidths(4, 8), BitWidths(16, 8)
FIXED = replace(RECIPES["qdit"], group_sizes=(), weight_group=32)
CALLS = 3
IMAGES = 4


def half_model(**kwargs) -> nn.Module:
    """Make a random model whose parameters float16 holds exactly."""
    return random_model(**kwargs).half().float()


def drive():
    return noise_drive(CALLS, torch.arange(IMAGES))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    return x, torch.tensor([10, 400, 990]), torch.tensor([1, 4, 10])


# Weights of 16 bits.

@pytest.mark.parametrize("name", ["qdit", "tfmq-dm", "ditas", "ditas-published", "ditas-plus"])
def test_weights_of_16_bits_are_left_alone(tmp_path, name):
    recipe = replace(RECIPES[name], group_sizes=())
    model = half_model()
    result = quantize_model(model, recipe, W16A8, drive())
    for layer_name, layer in result.layers.items():
        weight = layer.smoothing.of_weight(matrix(model.get_submodule(layer_name)))
        assert torch.equal(layer.weight.dense(), weight.half().float())
        assert layer.act.spec.bits in (8, OFF_BITS)

    # The file holds them so, and nothing of a quantised weight.
    path = tmp_path / "model.safetensors"
    shape = {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
    header = checkpoint_header(name, recipe, weight_bit=16, model="random", image_size=None)
    checkpoint.save(path, model, result, header)
    stored = load_file(path)
    assert not [key for key in stored if key.endswith((".codes", ".left"))]
    assert {stored[f"{key}.weight"].dtype for key in result.layers} == {torch.float16}
    read, loaded = checkpoint.load(path)
    assert shape.items() <= read.configuration.items()
    expected = install(deepcopy(model), result.layers, operands=result.operands)
    assert torch.equal(loaded(*inputs()), expected(*inputs()))


def test_16_bits_on_both_sides_are_the_float_model():
    model = half_model()
    result = quantize_model(model, replace(RECIPES["rtn"], scope="all"), BitWidths(16, 16), drive())
    assert relative(install(deepcopy(model), result.layers)(*inputs()), model(*inputs())) < 1e-5


def test_adaln_of_16_bits_is_left_alone_too():
    result = quantize_model(half_model(), RECIPES["ditas"], W16A8, drive())
    assert all("adaLN" not in name for name in result.layers)


def test_integer_products_need_quantised_weights_and_zero_points_that_are_codes():
    def obstacle(recipe: Recipe, bits: int) -> str:
        parts = integer_obstacle(recipe, weight_spec(recipe, bits), act_spec(recipe, 8))
        return str(UserError(*parts or ()))

    assert obstacle(RECIPES["ditas"], 4) == ""
    assert "weight_bit 2 to 8" in obstacle(RECIPES["ditas"], 16)
    assert "zero_point='widened'" in obstacle(replace(RECIPES["ditas"], convention="free"), 4)


# Inputs that are computed from the timestep.

@pytest.mark.parametrize("adaln_input", ["float", "quantised"])
def test_inputs_computed_from_the_timestep(adaln_input):
    model = half_model()
    recipe = replace(FIXED, adaln_input=adaln_input)
    quantised = install(deepcopy(model), quantize_model(model, recipe, W16A8, drive()).layers)
    for name, is_float in [
        ("blocks.1.adaLN_modulation.1", adaln_input == "float"),
        ("t_embedder.mlp.2", adaln_input == "float"),
        ("blocks.1.mlp.fc1", False),
    ]:
        linear = model.get_submodule(name)
        x = torch.randn(2, 5, 64)
        seen = x if is_float else fake_quantize(x, QuantSpec(8, "group", 32, "free"))
        assert relative(quantised.get_submodule(name)(x), linear(seen)) < 1e-5
        assert is_float or relative(linear(seen), linear(x)) > 1e-4


# Hessians.

def draw_call(model: nn.Module, sites: list[Site]) -> dict:
    trajectory, _ = record(model, sites, drive())
    picks = torch.tensor([[step, image] for step in range(CALLS) for image in (1, 6)])
    return trajectory.take(picks)


def seen_by(model: nn.Module, name: str, call: dict) -> Tensor:
    """Catch the input of a module while a model runs."""
    caught = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: caught.append(args[0]))
    model(**call)
    handle.remove()
    return caught[0]


def test_sequential_moments_are_those_of_what_quantised_blocks_give():
    """By the definition: quantised layers up to a block, in it activations alone."""
    model = half_model(depth=3)
    quantised = quantize_model(model, FIXED, W4A8, drive()).layers
    activations_only = quantize_model(model, FIXED, W16A8, drive()).layers
    acts = {name: layer.act for name, layer in quantised.items()}
    sites = [site for stage in stages_of(every_site(model)) for site in stage]
    smoothing = dict.fromkeys(acts, NO_SMOOTHING)
    call = draw_call(model, sites)
    task = Task(model, sites, FIXED, W4A8, "fast", torch.device("cpu"))
    so_far = QuantisedSoFar(task, acts, smoothing, {}, call)
    done: dict[str, QuantizedLayer] = {}
    for stage in stages_of(sites):
        moments = so_far.moments(stage)
        assert moments.keys() == {site.name for site in stage}
        before = install(deepcopy(model), activations_only | done)
        for site in stage:
            if site.role == "patches":
                continue  # its input is cut into patches
            x = fake_quantize(seen_by(before, site.name, call), acts[site.name].spec)
            rows = x.flatten(0, -2).double()
            assert relative(moments[site.name], rows.T @ rows) < 1e-4
        layers = {site.name: quantised[site.name] for site in stage}
        so_far.put({name: layer.weight for name, layer in layers.items()})
        done |= layers


def every_site(model: nn.Module) -> list[Site]:
    return architecture_named("dit").sites(model, "all")


def test_stages_follow_the_forward_pass():
    stages = [{site.block for site in stage} for stage in stages_of(every_site(random_model()))]
    assert stages == [{None}, {"blocks.0"}, {"blocks.1"}, {None}]
    assert stages_of(every_site(random_model()))[-1][-1].name == "final_layer.linear"


def test_the_hessian_changes_weights_behind_the_first_block_alone():
    """Before it nothing is quantised yet but the layers' own inputs, which are wide here."""
    model = half_model()
    recipe = replace(FIXED, act_granularity="token", scope="blocks")
    weights = {}
    for hessian in ("float", "sequential"):
        changed = replace(recipe, hessian=hessian)
        weights[hessian] = quantize_model(model, changed, BitWidths(3, 16), drive()).layers
    last = "blocks.1.mlp.fc2"
    assert not torch.equal(
        weights["float"][last].weight.dense(), weights["sequential"][last].weight.dense())


# Group sizes.

@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("seed", range(3))
def test_the_integer_program_finds_what_brute_force_finds(constraint, seed):
    allowed, chance = CONSTRAINTS[constraint], random.Random(seed)
    costs = {name: {size: float(chance.randint(1, 1000)) for size in sizes}
             for name, sizes in CHOICES.items()}

    def total(groups):
        return sum(costs[name][size] for name, size in groups.items())

    every = (dict(zip(CHOICES, sizes)) for sizes in itertools.product(*CHOICES.values()))
    least = min(total(groups) for groups in every if allowed(groups))
    found = least_cost(costs, allowed)
    assert allowed(found) and total(found) == least
    # Another unit of the costs changes nothing.
    tiny = {name: {size: cost * 1e-9 for size, cost in sizes.items()}
            for name, sizes in costs.items()}
    assert total(least_cost(tiny, allowed)) == least


def test_integer_programs_without_an_answer_are_refused():
    costs = {name: dict.fromkeys(sizes, 1.0) for name, sizes in CHOICES.items()}
    with pytest.raises(ValueError, match="not even the largest of every layer"):
        least_cost(costs, mean_at_least(289))
    costs["layer0"][32] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        least_cost(costs, mean_at_least(128))


def test_constraints_hold_at_their_limit():
    shapes = {"a": (10, 64), "b": (3, 100)}
    groups = {"a": 32, "b": 48}
    # The last group of 48 of 100 is short, and costs as much as any other.
    operations = (10 * 64 + 3 * 100) * 32 + (10 * 2 + 3 * 3) * 1024
    assert bit_ops(groups, shapes, 4, 8) == operations
    assert bit_ops_at_most(operations, shapes, 4, 8)(groups)
    assert not bit_ops_at_most(operations - 1, shapes, 4, 8)(groups)
    third = mean_at_least((32 + 32 + 64) / 3)
    assert third({"a": 32, "b": 32, "c": 64})
    assert not third({"a": 32, "b": 32, "c": 32})


def test_costs_of_a_layer_are_quadratic_forms():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, 16, generator=generator)
    weight = torch.randn(12, 16, generator=generator)
    difference = 0.1 * torch.randn(12, 16, generator=generator)
    off = Activation(QuantSpec(OFF_BITS, "token"))
    layer = QuantizedLayer(float_weight(weight + difference), off)

    rows, change = x.flatten(0, 1).double(), difference.double()
    form = (change @ (rows.T @ rows) @ change.T).trace() / (200 * 12)
    assert output_error(x, weight, layer) == pytest.approx(form.item(), rel=1e-4)
    expected = rows.square().mean() * change.square().sum()
    assert hessian_error(x, weight, layer) == pytest.approx(expected.item(), rel=1e-4)

    # Of inputs without correlation both are the same, but that one is a mean over outputs.
    white = torch.linalg.qr(torch.randn(40, 16, generator=generator)).Q * 40 ** 0.5
    by_output, by_trace = (cost(white, weight, layer) for cost in (output_error, hessian_error))
    assert 12 * by_output == pytest.approx(by_trace, rel=1e-4)

    # An input's own error is a part of the output's.
    coarse = QuantizedLayer(float_weight(weight), Activation(QuantSpec(4, "token")))
    error = (fake_quantize(x, coarse.act.spec) - x) @ weight.T
    assert output_error(x, weight, coarse) == pytest.approx(error.square().mean().item(), rel=1e-4)
    assert hessian_error(x, weight, coarse) == 0


@pytest.mark.parametrize("allocate", ["ilp", "hessian"])
def test_an_integer_program_is_judged_once_and_keeps_to_the_constraint(allocate):
    judged = []

    def loss(model: nn.Module) -> float:
        judged.append(model)
        return 2.5

    recipe = replace(
        RECIPES["qdit"], scope="blocks", group_sizes=(16, 32, 64), allocate=allocate,
        weight="nearest", weight_group=48)  # divides no width, and is no choice
    result = quantize_model(
        half_model(), recipe, W4A8, drive(), search=GroupSearch(Judge(loss, "test")))
    sizes = list(result.groups.values())
    assert len(judged) == 1 and result.allocation.loss == 2.5
    assert sum(sizes) / len(sizes) >= 128 / 140.8 * (16 + 32 + 64) / 3 - 1e-6
    assert len(set(sizes)) > 1
    assert result.evolution == ()
    for name, layer in result.layers.items():
        assert layer.weight.base.spec.group == layer.act.spec.group == result.groups[name]


def test_sizes_that_do_not_divide_run_with_a_short_last_group(tmp_path):
    recipe = replace(FIXED, weight_group=48)
    model = half_model()
    with pytest.raises(ValueError, match="group size 48 does not divide"):
        quantize_model(model, recipe, W4A8, drive())
    recipe = replace(recipe, group_tail="allow")
    result = quantize_model(model, recipe, W4A8, drive())
    assert result.layers["blocks.0.attn.qkv"].weight.base.scale.shape == (192, 2, 1)
    path = tmp_path / "model.safetensors"
    header = checkpoint_header("qdit", recipe, model="random", image_size=None)
    checkpoint.save(path, model, result, header)
    expected = install(deepcopy(model), result.layers)
    assert torch.equal(checkpoint.load(path)[1](*inputs()), expected(*inputs()))


def test_the_judge_samples_by_ddim_without_guidance():
    recipe = RECIPES["qdit"]
    assert (recipe.judge_sampler, recipe.judge_cfg_scale) == ("ddim", 1.0)
    model, other = half_model(), half_model(seed=1)
    images = []
    handle = other.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    schedule = make_schedule("3")
    loss = sqnr_judge(model, Sampling(schedule, 0, 1.0, "ddim")).loss(other)
    handle.remove()
    assert images == [8] * 3  # without guidance there is no half without labels

    labels = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])  # spread over the ten classes
    latents = [generate_latents(m, schedule, range(8), labels, 0, 1.0, ddim_step)
               for m in (model, other)]
    assert loss == pytest.approx(-sqnr_db(*latents))


# Sizes, in MB as table 2 of the paper has them.

@pytest.mark.parametrize("bits, recipe, published", [
    (4, RECIPES["ptq4dm"], 339),
    (4, RECIPES["ptq4dit"], 339),
    (6, RECIPES["ptq4dm"], 508),
    (6, replace(FIXED, weight_group=128), 518),
])
def test_sizes_are_the_papers_on_dit_xl_2(bits, recipe, published):
    assert megabytes(recipe, bits) == pytest.approx(published, abs=1)


def test_sizes_of_groups_lie_about_the_papers_347():
    sizes = {size: megabytes(replace(FIXED, weight_group=size), 4) for size in (32, 64, 128, 192)}
    assert sizes[192] < 347 < sizes[128] < 351 < sizes[64] < sizes[32]


def megabytes(recipe: Recipe, bits: int) -> float:
    name, configuration = registered_configuration("DiT-XL/2", 256, 1000)
    header = checkpoint_header(
        "test", replace(recipe, group_tail="allow", group_sizes=()), model="DiT-XL/2",
        image_size=256, num_classes=1000, weight_bit=bits, architecture=name,
        configuration=configuration)
    return counted_bytes(header) / 1e6


def test_the_float_model_has_the_papers_size():
    name, configuration = registered_configuration("DiT-XL/2", 256, 1000)
    model = empty_model(architecture_named(name), configuration)
    assert round(float_bytes(model) / 1e6) == 1349
