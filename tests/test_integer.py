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
from errors import UserError, as_flag
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
from quant.numerics.smoothing import NO_SMOOTHING, Smoothing
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import fake_quantize, quantize
from quant.recipe import act_spec, adaln_spec, weight_spec
from quant.weights.low_rank import lowrank_quantize, without_branch
from quant.weights.rounding import nearest_quantizer, quantize_weight

READY = ("rtn", "smoothquant", "ditas", "ditas-plus")
TOKEN = Activation(QuantSpec(8, "token"))
# Where oneDNN's sums saturate at 16 bits, only the reference computes on integers.
INT8 = supported()
TWO_LEVEL = QuantSpec(4, "group", 64, "two-level")


def make_layer(rows, columns, spec, rank=3) -> QuantizedLayer:
    """A random layer with smoothing, a low-rank branch and output scales."""
    torch.manual_seed(0)
    factors = torch.exp(torch.randn(columns))
    weight = 0.05 * torch.randn(rows, columns) * factors
    low_rank = lowrank_quantize(weight, nearest_quantizer(spec), rank, 2, "best", "fast")
    return QuantizedLayer(
        low_rank.integer_branch(weight), TOKEN, Smoothing(factors), torch.rand(rows) + 0.5)


def plain_layer(weight, spec, act=TOKEN) -> QuantizedLayer:
    """A weight quantised to the nearest codes, and nothing else."""
    return QuantizedLayer(without_branch(quantize(weight, spec)), act)


def modules(layer: QuantizedLayer, bias) -> dict:
    """The layer in every integer arithmetic that it has on this CPU."""
    weight = integer_weight(layer)
    half = nibbles(layer)
    act = layer.act.spec
    factors = layer.smoothing.factors
    every = {"reference": ReferenceLinear(weight, bias, factors, act)}
    if INT8:
        every["onednn"] = OneDNNLinear(weight, bias, factors, act)
    if INT8 and half is not None:
        every["nibbles"] = OneDNNNibbleLinear(weight, half, bias, factors, act)
    return every


@pytest.mark.parametrize("recipe_name", READY)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_backend_agrees_with_the_simulated_layer(recipe_name, bits):
    recipe = RECIPES[recipe_name]
    layer = make_layer(96, 128, weight_spec(recipe, bits), 3 if recipe.rank != 0 else 0)
    bias = torch.randn(96)
    x = 3 * torch.randn(2, 7, 128)
    half = x.bfloat16()
    for act_bits in range(4, 9):
        layer = replace(layer, act=Activation(act_spec(recipe, act_bits)))
        fake = QuantLinear(layer, bias)(x)
        fake_half = QuantLinear(layer, bias, torch.bfloat16)(half)
        for name, module in modules(layer, bias).items():
            assert relative(module(x), fake) < 1e-5, name
            assert module(half).dtype == torch.bfloat16
            assert relative(module(half), fake_half) < 1e-2, name


@pytest.mark.parametrize("rows, columns, tokens, group", [
    (1, 1, 1, 1),
    (3, 5, 1, 5),
    (17, 33, 3, 11),
    (130, 63, 2, 21),
    (65, 192, 1, 64),
    (64, 100, 9, 50),
])
def test_odd_shapes(rows, columns, tokens, group):
    two_level = QuantSpec(4, "group", group, "two-level")
    for spec in (two_level, QuantSpec(8, "channel"), QuantSpec(3, "channel")):
        layer = make_layer(rows, columns, spec, rank=min(2, rows, columns))
        x = torch.randn(1, tokens, columns)
        fake = QuantLinear(layer, None)(x)
        for name, module in modules(layer, None).items():
            assert relative(module(x), fake) < 1e-5, (name, spec)


@pytest.mark.parametrize("granularity", ["token", "image"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_are_those_of_the_simulated_quantiser(granularity, bits):
    spec = QuantSpec(bits, granularity)
    x = torch.randn(3, 11, 50) * torch.exp(3 * torch.randn(3, 11, 1))
    x[0, 0] = 0
    x[1, 1] = 4.0
    weight = quantize(torch.randn(4, 50), QuantSpec(4, "channel"))
    smoothing = Smoothing(torch.full((50,), 1.5))
    layer = QuantizedLayer(without_branch(weight), Activation(spec), smoothing)
    expected = quantize(x / 1.5, spec)  # the quantiser that weights take
    for module in modules(layer, None).values():
        seen = []
        product = module.product

        def watched(codes, seen=seen, product=product):
            seen.append(codes)
            return product(codes)

        module.product = watched
        module(x)
        assert torch.equal(seen[0].view(x.shape), expected.codes)
    assert torch.equal(fake_quantize(x / 1.5, spec), expected.dequantize())


def test_sums_are_exact_even_where_they_are_largest():
    """All codes are 255 and all weights 127.

    255 * 127 * 4608 = 149 million lies beyond float32's integers and within int32's.
    """
    codes = torch.full((2, 4608), 255, dtype=torch.uint8)
    expected = torch.full((2, 16), 255 * 127 * 4608, dtype=torch.float32)
    ones = plain_layer(torch.ones(16, 4608), QuantSpec(7, "channel"))
    for module in modules(ones, None).values():
        assert torch.equal(module.product(codes), expected)


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 300), st.integers(0, 10 ** 6))
def test_sums_are_those_of_numpy(tokens, rows, columns, seed):
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=(rows, columns)).astype(np.float32))
    layer = plain_layer(weight, QuantSpec(int(rng.integers(2, 9)), "channel"))
    codes = rng.integers(0, 256, (tokens, columns), dtype=np.uint8)
    integers = integer_weight(layer)
    integer_rows = torch.cat([integers.codes, integers.right]).numpy().astype(np.int64)
    expected = (codes.astype(np.int64) @ integer_rows.T).astype(np.float32)
    for module in modules(layer, None).values():
        assert np.array_equal(module.product(torch.from_numpy(codes)).numpy(), expected)


@settings(max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 2, 8, 16]), st.integers(2, 8),
    st.integers(0, 10 ** 6))
def test_two_level_weights_expand_to_int8(rows, groups, size, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * size, generator=generator)
    weight = weight * torch.exp(2 * torch.randn(rows, groups * size, generator=generator))
    weight[0, 0] = 0.0
    quantized = quantize_weight(weight, QuantSpec(bits, "group", size, "two-level"))
    codes = quantized.codes.unflatten(1, (groups, -1)).double()
    integers = (codes - quantized.zero) * quantized.scale
    assert int(quantized.codes.max()) < 2 ** bits and integers.abs().max() <= 127
    for whole, low, high in ((quantized.scale, 1, 127), (quantized.zero, 0, 2 ** bits - 1)):
        assert torch.equal(whole, whole.round()) and low <= whole.min() and whole.max() <= high
    assert torch.equal(quantized.step, quantized.step.bfloat16().float())
    expanded = integer_weight(QuantizedLayer(without_branch(quantized), None))
    assert torch.equal(expanded.codes.double(), integers.flatten(1))
    assert torch.equal(quantized.dequantize(), (integers.flatten(1) * quantized.step).float())


def test_two_level_scales_lose_little_against_floating_ones():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(128, 512, generator=generator)
    weight = weight * torch.exp(0.5 * torch.randn(1, 512, generator=generator))
    floating = (quantize(weight, QuantSpec(4, "group", 64)).dequantize() - weight).norm()
    two_level = (quantize_weight(weight, TWO_LEVEL).dequantize() - weight).norm()
    assert two_level < 1.02 * floating


def test_importance_moves_the_error_to_where_it_costs_less():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 128, generator=generator)
    cost = torch.exp(2 * torch.randn(128, generator=generator))

    def loss(quantized):
        return ((quantized.dequantize() - weight).square() * cost).sum()

    weighted = loss(quantize_weight(weight, TWO_LEVEL, cost))
    assert weighted < 0.99 * loss(quantize_weight(weight, TWO_LEVEL))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_only_layer_keeps_its_input(bits):
    weight = torch.randn(60, 40)
    quantized = quantize_weight(weight, adaln_spec(bits, 40))
    layer = QuantizedLayer(without_branch(quantized), None, rows=torch.rand(60) + 0.5)
    bias = torch.randn(60)
    x = torch.randn(3, 40) * torch.tensor([[1.0], [100.0], [0.0]])
    x[2] = torch.tensor([0.0, 0.3])[bits // 8]  # constant
    expected = QuantLinear(layer, bias)(x)
    weight_only = WeightOnlyLinear(layer, bias)(x)
    assert relative(weight_only, expected) < 1e-6
    if INT8:
        on_integers = OneDNNWeightOnly(integer_weight(layer), bias)(x)
        assert relative(on_integers, weight_only) < 1e-9


def quantised(recipe, bits, adaln_bits, model):
    """Layers of a model with random smoothing, without calibration."""
    quantizer = nearest_quantizer(weight_spec(recipe, bits))
    rank = 2 if recipe.rank is None else 0
    act = Activation(act_spec(recipe, 8))
    layers = {}
    for i, (name, linear) in enumerate(block_linears(model).items()):
        smoothing = NO_SMOOTHING
        if recipe.balance != "none":
            generator = torch.Generator().manual_seed(i)
            smoothing = Smoothing(torch.exp(torch.randn(linear.in_features, generator=generator)))
        weight = smoothing.of_weight(linear.weight)
        low_rank = lowrank_quantize(weight, quantizer, rank, 2, "best", "fast")
        layers[name] = QuantizedLayer(low_rank.integer_branch(weight), act, smoothing)
    if adaln_bits < 16:
        for name, linear in modulation_linears(model).items():
            quantized = quantize_weight(linear.weight, adaln_spec(adaln_bits, linear.in_features))
            layers[name] = QuantizedLayer(without_branch(quantized), None)
    return layers


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("recipe_name, bits, adaln_bits", [
    ("ditas", 4, 8),
    ("ditas", 8, 4),
    ("ditas", 4, 16),
    ("rtn", 8, 16),
    ("smoothquant", 4, 8),
])
def test_whole_models_agree_folded_or_not(recipe_name, bits, adaln_bits, folded):
    recipe = RECIPES[recipe_name]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 10])
    layers = quantised(recipe, bits, adaln_bits, random_model(depth=1))

    def output(backend, dtype=torch.float32, packed=False):
        model = random_model(depth=1)
        ready = fold(model, layers) if folded else layers
        return install(model, ready, backend, dtype, packed=packed)(*inputs)

    fake = output("fake")
    fake_half = output("fake", torch.bfloat16)
    backends = [("reference", False)]
    if INT8:
        backends += [("integer", False), ("integer", True)]
    for backend, packed in backends:
        assert relative(output(backend, packed=packed), fake) < 1e-6
        assert relative(output(backend, torch.bfloat16, packed), fake_half) < 3e-2
    assert relative(fake_half, fake) < 5e-2


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
    # A code may flip where the fused code rounds differently.
    assert relative(model(*inputs), eager) < 1e-3
    # The blocks share a graph.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_folding_changes_no_code():
    model = random_model(depth=1)
    before = quantised(RECIPES["ditas"], 4, 8, model)
    after = fold(model, before)
    assert before.keys() == after.keys()
    # Those of adaLN and qkv.
    assert sum(layer.rows is not None for layer in after.values()) == 2
    for name, layer in after.items():
        assert torch.equal(layer.weight.base.codes, before[name].weight.base.codes)
        assert torch.equal(integer_weight(layer).codes, integer_weight(before[name]).codes)


OTHERS = "use --recipe rtn, smoothquant, ditas, ditas-plus or ditas-tuned"


@pytest.mark.parametrize("recipe, act_bits, message", [
    (RECIPES["ditas"], 16, "quantise with --act-bit 4 to 8"),
    (RECIPES["ditas-published"], 8, OTHERS),
    (replace(RECIPES["ditas"], weight_scales="float"), 8, "--weight-scales two-level"),
    (RECIPES["ptq4dm"], 8, OTHERS),
    (RECIPES["repq-vit"], 8, OTHERS),
    (RECIPES["tfmq-dm"], 8, OTHERS),
    (RECIPES["g4w-p4a"], 8, OTHERS),
    (RECIPES["ptq4dit"], 8, OTHERS),
    (RECIPES["qdit"], 8, OTHERS),
])
def test_what_cannot_run_on_integers_says_why(recipe, act_bits, message):
    reason = integer_obstacle(recipe, weight_spec(recipe, 4), act_spec(recipe, act_bits))
    assert message in UserError(*reason).spelled(as_flag)
    for backend in ("auto", "fake"):
        assert resolve(backend, reason, torch.device("cpu"), pytest.fail) == "fake"
    with pytest.raises(UserError, match="cannot run this checkpoint"):
        resolve("integer", reason, torch.device("cpu"), pytest.fail)


def test_a_processor_without_int8_falls_back_with_a_warning(monkeypatch, capsys):
    device = torch.device("cpu")
    monkeypatch.setattr("quant.integer.cpu.supported", lambda: False)
    assert resolve("auto", None, device, pytest.fail) == "fake"
    assert capsys.readouterr().err == ""
    assert resolve("integer", None, device, pytest.fail) == "fake"
    assert "warning: no int8 instructions" in capsys.readouterr().err
    monkeypatch.setattr("quant.integer.cpu.supported", lambda: True)
    assert resolve("integer", None, device, pytest.fail) == "integer"
    assert resolve("auto", None, device, lambda: "fake") == "fake"
    assert resolve("auto", None, device, lambda: "integer") == "integer"


@pytest.mark.parametrize("seconds, chosen", [
    ({"fake": 3, "integer": 1}, "integer"),
    ({"fake": 1, "integer": 3}, "fake"),
    ({"fake": 10, "integer": 19}, "integer"),
    ({"fake": 10, "integer": 21}, "fake"),
])
def test_the_faster_backend_is_the_one_that_takes_less_time(seconds, chosen, monkeypatch):
    """By a clock that the modules turn; integers in close calls. The first call may take long."""
    clock = SimpleNamespace(now=0.0)
    calls = Counter()

    class Module(torch.nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.backend = backend

        def forward(self, x):
            calls[self] += 1
            late = calls[self] == 1 and self.backend == chosen
            clock.now += 1000 if late else seconds[self.backend]

    monkeypatch.setattr("quant.backend.time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(
        "quant.backend.make_linear", lambda layer, bias, backend, *_: Module(backend))
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
