"""Integer arithmetic against the simulated path, brute force and between the backends."""
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import block_linears, modulation_linears, random_model, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from config import RECIPES
from errors import UserError
from quant.activations.quantisers import Activation
from quant.backend import faster, resolve
from quant.install import install
from quant.integer.cpu import OneDNNLinear, OneDNNNibbleLinear, OneDNNWeightOnly, supported
from quant.integer.linear import ReferenceLinear
from quant.integer.weight import integer_obstacle, integer_weight, nibbles
from quant.layers.fold import fold
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.layers.weight_only import WeightOnlyLinear
from quant.numerics.smoothing import Smoothing
from quant.numerics.uniform import QuantSpec, fake_quantize, quantize
from quant.recipe import act_spec, adaln_spec, weight_spec
from quant.weights.low_rank import lowrank_quantize, without_branch
from quant.weights.rounding import nearest_quantizer, quantize_weight

READY = ("rtn", "smoothquant", "ditas", "ditas-plus")
TOKEN = Activation(QuantSpec(8, "token"))
TWO_LEVEL = QuantSpec(4, "group", 64, "two-level")
# Where oneDNN's sums saturate at 16 bits, nothing computes on integers: only the reference is tested.
INT8 = supported()


def layer(rows, columns, spec, rank=3, smooth=True, seed=0, act=TOKEN) -> QuantizedLayer:
    torch.manual_seed(seed)
    factors = torch.exp(torch.randn(columns)) if smooth else None
    weight = 0.05 * torch.randn(rows, columns) * (1 if factors is None else factors)
    found = lowrank_quantize(weight, nearest_quantizer(spec), rank, 2, "best", "fast")
    return QuantizedLayer(found.integer_branch(weight), act, Smoothing(factors), torch.rand(rows) + 0.5)


def modules(made: QuantizedLayer, bias) -> dict:
    weight, half, act = integer_weight(made), nibbles(made), made.act.spec
    every = {"reference": ReferenceLinear(weight, bias, made.smoothing.factors, act)}
    if INT8:
        every["onednn"] = OneDNNLinear(weight, bias, made.smoothing.factors, act)
        if half is not None:
            every["nibbles"] = OneDNNNibbleLinear(weight, half, bias, made.smoothing.factors, act)
    return every


@pytest.mark.parametrize("recipe_name", READY)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_backend_agrees_with_the_simulated_layer(recipe_name, bits):
    recipe = RECIPES[recipe_name]
    made = layer(96, 128, weight_spec(recipe, bits), 3 if recipe.rank != 0 else 0)
    bias, x = torch.randn(96), 3 * torch.randn(2, 7, 128)
    for act_bits in range(4, 9):
        made = replace(made, act=Activation(act_spec(recipe, act_bits)))
        fake = QuantLinear(made, bias)(x)
        for name, module in modules(made, bias).items():
            assert relative(module(x), fake) < 1e-5, name
            assert module(x.bfloat16()).dtype == torch.bfloat16
            assert relative(module(x.bfloat16()), QuantLinear(made, bias, torch.bfloat16)(x.bfloat16())) < 1e-2, name


@pytest.mark.parametrize("rows, columns, tokens", [(1, 1, 1), (3, 5, 1), (17, 33, 3), (130, 63, 2), (65, 192, 1), (64, 100, 9)])
def test_odd_shapes(rows, columns, tokens):
    group = {1: 1, 5: 5, 33: 11, 63: 21, 192: 64, 100: 50}[columns]
    for spec in (QuantSpec(4, "group", group, "two-level"), QuantSpec(8, "channel"), QuantSpec(3, "channel")):
        made = layer(rows, columns, spec, rank=min(2, rows, columns))
        x = torch.randn(1, tokens, columns)
        fake = QuantLinear(made, None)(x)
        for name, module in modules(made, None).items():
            assert relative(module(x), fake) < 1e-5, (name, spec)


@pytest.mark.parametrize("granularity", ["token", "image"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_are_those_of_the_simulated_quantiser(granularity, bits):
    spec, x = QuantSpec(bits, granularity), torch.randn(3, 11, 50) * torch.exp(3 * torch.randn(3, 11, 1))
    x[0, 0], x[1, 1] = 0, 4.0
    expected = quantize(x / 1.5, spec)  # the quantiser that weights take
    weight = without_branch(quantize(torch.randn(4, 50), QuantSpec(4, "channel")))
    for module in modules(QuantizedLayer(weight, Activation(spec), Smoothing(torch.full((50,), 1.5))), None).values():
        seen = []
        product = module.product
        module.product = lambda codes: seen.append(codes) or product(codes)
        module(x)
        assert torch.equal(seen[0].view(x.shape), expected.codes)
    assert torch.equal(fake_quantize(x / 1.5, spec), expected.dequantize())


def test_sums_are_exact_even_where_they_are_largest():
    """All codes 255, all weights 127: 255 * 127 * 4608 = 149 million, beyond float32's integers, within int32's."""
    codes = torch.full((2, 4608), 255, dtype=torch.uint8)
    ones = QuantizedLayer(without_branch(quantize(torch.ones(16, 4608), QuantSpec(7, "channel"))), TOKEN)
    for module in modules(ones, None).values():
        assert torch.equal(module.product(codes), torch.full((2, 16), 255 * 127 * 4608, dtype=torch.float32))


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 300), st.integers(0, 10 ** 6))
def test_sums_are_those_of_numpy(tokens, rows, columns, seed):
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=(rows, columns)).astype(np.float32))
    made = QuantizedLayer(without_branch(quantize(weight, QuantSpec(int(rng.integers(2, 9)), "channel"))), TOKEN)
    codes = rng.integers(0, 256, (tokens, columns), dtype=np.uint8)
    integers = integer_weight(made)
    expected = codes.astype(np.int64) @ torch.cat([integers.codes, integers.right]).numpy().astype(np.int64).T
    for module in modules(made, None).values():
        assert np.array_equal(module.product(torch.from_numpy(codes)).numpy(), expected.astype(np.float32))


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 2, 8, 16]), st.integers(2, 8), st.integers(0, 10 ** 6))
def test_two_level_weights_expand_to_int8(rows, groups, size, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * size, generator=generator) * torch.exp(2 * torch.randn(rows, groups * size, generator=generator))
    weight[0, 0] = 0.0
    made = quantize_weight(weight, QuantSpec(bits, "group", size, "two-level"))
    integers = (made.codes.unflatten(1, (groups, -1)).double() - made.zero) * made.scale
    assert int(made.codes.max()) < 2 ** bits and integers.abs().max() <= 127
    for whole, low, high in ((made.scale, 1, 127), (made.zero, 0, 2 ** bits - 1)):
        assert torch.equal(whole, whole.round()) and low <= whole.min() and whole.max() <= high
    assert torch.equal(made.step, made.step.bfloat16().float())
    assert torch.equal(integer_weight(QuantizedLayer(without_branch(made), None)).codes.double(), integers.flatten(1))
    assert torch.equal(made.dequantize(), (integers.flatten(1) * made.step).float())


def test_two_level_scales_lose_little_against_floating_ones():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(128, 512, generator=generator) * torch.exp(0.5 * torch.randn(1, 512, generator=generator))
    floating = (quantize(weight, QuantSpec(4, "group", 64)).dequantize() - weight).norm()
    assert (quantize_weight(weight, TWO_LEVEL).dequantize() - weight).norm() < 1.02 * floating


def test_importance_moves_the_error_to_where_it_costs_less():
    generator = torch.Generator().manual_seed(2)
    weight, cost = torch.randn(64, 128, generator=generator), torch.exp(2 * torch.randn(128, generator=generator))

    def loss(made):
        return ((made.dequantize() - weight).square() * cost).sum()
    assert loss(quantize_weight(weight, TWO_LEVEL, cost)) < 0.99 * loss(quantize_weight(weight, TWO_LEVEL))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_only_layer_keeps_its_input(bits):
    weight = torch.randn(60, 40)
    made = QuantizedLayer(without_branch(quantize_weight(weight, adaln_spec(bits, 40))), None, None, torch.rand(60) + 0.5)
    bias, x = torch.randn(60), torch.randn(3, 40) * torch.tensor([[1.0], [100.0], [0.0]])
    x[2] = torch.tensor([0.0, 0.3])[bits // 8]  # constant
    expected = QuantLinear(made, bias)(x)
    assert relative(WeightOnlyLinear(made, bias)(x), expected) < 1e-6
    if INT8:
        assert relative(OneDNNWeightOnly(integer_weight(made), bias)(x), WeightOnlyLinear(made, bias)(x)) < 1e-9


def quantised(recipe, bits, adaln_bits, model):
    spec, layers = weight_spec(recipe, bits), {}
    for i, (name, linear) in enumerate(block_linears(model).items()):
        smooth = None if recipe.balance == "none" else torch.exp(torch.randn(linear.in_features, generator=torch.Generator().manual_seed(i)))
        weight = linear.weight if smooth is None else linear.weight * smooth
        found = lowrank_quantize(weight, nearest_quantizer(spec), 2 if recipe.rank is None else 0, 2, "best", "fast")
        layers[name] = QuantizedLayer(found.integer_branch(weight), Activation(act_spec(recipe, 8)), Smoothing(smooth))
    if adaln_bits < 16:
        layers |= {name: QuantizedLayer(without_branch(quantize_weight(linear.weight, adaln_spec(adaln_bits, linear.in_features))), None)
                   for name, linear in modulation_linears(model).items()}
    return layers


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("recipe_name, bits, adaln_bits", [("ditas", 4, 8), ("ditas", 8, 4), ("ditas", 4, 16), ("rtn", 8, 16), ("smoothquant", 4, 8)])
def test_whole_models_agree_folded_or_not(recipe_name, bits, adaln_bits, folded):
    recipe = RECIPES[recipe_name]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 10])
    layers = quantised(recipe, bits, adaln_bits, random_model(depth=1))

    def output(backend, dtype=torch.float32, packed=False):
        model = random_model(depth=1)
        return install(model, fold(model, layers) if folded else layers, backend, dtype, packed=packed)(*inputs)

    fake = output("fake")
    backends = [{"backend": "reference"}]
    if INT8:
        backends += [{"backend": "integer"}, {"backend": "integer", "packed": True}]
    for backend in backends:
        assert relative(output(**backend), fake) < 1e-6
        assert relative(output(**backend, dtype=torch.bfloat16), output("fake", torch.bfloat16)) < 3e-2
    assert relative(output("fake", torch.bfloat16), fake) < 5e-2


@pytest.mark.parametrize("backend", ["fake", "integer"])
def test_compiled_blocks_give_the_same(backend):
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 10])
    model = random_model(depth=2)
    layers = quantised(RECIPES["ditas"], 4, 8, model)
    model = install(model, fold(model, layers), backend)
    eager = model(*inputs)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for block in model.blocks:
        block.compile(fullgraph=True)
    assert relative(model(*inputs), eager) < 1e-3  # a code may flip where the fused code rounds differently
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1  # the blocks share it


def test_folding_changes_no_code():
    model = random_model(depth=1)
    before = quantised(RECIPES["ditas"], 4, 8, model)
    after = fold(model, before)
    assert before.keys() == after.keys() and sum(each.rows is not None for each in after.values()) == 2  # adaLN and qkv
    for name, each in after.items():
        assert torch.equal(each.weight.base.codes, before[name].weight.base.codes)
        assert torch.equal(integer_weight(each).codes, integer_weight(before[name]).codes)


@pytest.mark.parametrize("recipe, act_bits, message", [
    (RECIPES["ditas"], 16, "--act-bit 16"),
    (RECIPES["ditas-published"], 8, "use recipe ditas"),
    (replace(RECIPES["ditas"], weight_scales="float"), 8, "--weight-scales two-level"),
    *((RECIPES[name], 8, "use recipe ditas") for name in ("ptq4dm", "repq-vit", "tfmq-dm", "g4w-p4a", "ptq4dit", "qdit")),
])
def test_what_cannot_run_on_integers_says_why(recipe, act_bits, message):
    reason = integer_obstacle(recipe, weight_spec(recipe, 4), act_spec(recipe, act_bits))
    assert message in reason
    for backend in ("auto", "fake"):
        assert resolve(backend, reason, torch.device("cpu"), pytest.fail) == "fake"
    with pytest.raises(UserError, match="cannot run this checkpoint"):
        resolve("integer", reason, torch.device("cpu"), pytest.fail)


def test_a_processor_without_int8_falls_back_with_a_warning(monkeypatch, capsys):
    device = torch.device("cpu")
    monkeypatch.setattr("quant.integer.cpu.supported", lambda: False)
    assert resolve("auto", None, device, pytest.fail) == "fake" and capsys.readouterr().err == ""
    assert resolve("integer", None, device, pytest.fail) == "fake" and "warning: no int8 instructions" in capsys.readouterr().err
    monkeypatch.setattr("quant.integer.cpu.supported", lambda: True)
    assert resolve("integer", None, device, pytest.fail) == "integer"
    assert [resolve("auto", None, device, lambda: measured) for measured in ("fake", "integer")] == ["fake", "integer"]


@pytest.mark.parametrize("seconds, chosen", [({"fake": 3, "integer": 1}, "integer"), ({"fake": 1, "integer": 3}, "fake"),
                                             ({"fake": 10, "integer": 19}, "integer"), ({"fake": 10, "integer": 21}, "fake")])
def test_the_faster_backend_is_the_one_that_takes_less_time(seconds, chosen, monkeypatch):
    """By a clock that the modules turn; integers in close calls. The first call may take long."""
    clock, calls = SimpleNamespace(now=0.0), Counter()

    class Module(torch.nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.backend = backend

        def forward(self, x):
            calls[self] += 1
            clock.now += 1000 if calls[self] == 1 and self.backend == chosen else seconds[self.backend]

    monkeypatch.setattr("quant.backend.time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr("quant.backend._linear", lambda layer, bias, backend, *_: Module(backend))
    layers = list(quantised(RECIPES["ditas"], 4, 8, random_model(depth=1)).values())
    assert faster(layers, 16, torch.float32, torch.device("cpu"), False) == chosen


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_can_be_timed_on_a_real_layer(dtype, packed):
    layers = quantised(RECIPES["ditas"], 4, 8, random_model(depth=1))
    blocks = [layers[name] for name in block_linears(random_model(depth=1))]
    assert faster(blocks, 16, dtype, torch.device("cpu", 0), packed) in ("fake", "integer")


def test_a_numbered_cpu_is_the_cpu():
    """accelerate calls it cpu:0 under torchrun, and packed weights refuse to be copied there."""
    model = random_model(depth=1)
    layers = quantised(RECIPES["ditas"], 4, 8, model)
    install(model, layers, "integer", device=torch.device("cpu", 0))
