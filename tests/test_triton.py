"""The Triton kernels under Triton's interpreter, which runs on any machine, or on a GPU if any."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import relative
from test_integer import make_layer

from config import RECIPES
from quant.integer.linear import ReferenceLinear
from quant.integer.weight import integer_weight, nibbles
from quant.layers.quantised import QuantizedLayer
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import quantize, signed_codes
from quant.recipe import act_spec, weight_spec
from quant.weights.low_rank import without_branch

pytest.importorskip("triton", reason="Triton has no package for this platform")
ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def cuda():
    return importlib.import_module("quant.integer.cuda")


def pair(cuda, layer, bias, act):
    weight = integer_weight(layer)
    kernel = cuda.TritonLinear(weight, nibbles(layer), bias, layer.smoothing.factors, act)
    reference = ReferenceLinear(weight, bias, layer.smoothing.factors, act)
    return kernel.to(DEVICE), reference.to(DEVICE)


@pytest.mark.parametrize("recipe_name", ["rtn", "smoothquant", "ditas", "ditas-plus"])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_outputs_are_those_of_the_reference(cuda, recipe_name, bits):
    recipe = RECIPES[recipe_name]
    layer = make_layer(80, 128, weight_spec(recipe, bits), 3 if recipe.rank != 0 else 0)
    bias = torch.randn(80)
    x = 3 * torch.randn(2, 7, 128, device=DEVICE)
    kernel, reference = pair(cuda, layer, bias, act_spec(recipe, 8))
    assert (kernel.tile > 0) == (bits <= 4)
    assert relative(kernel(x), reference(x)) < 1e-5
    assert relative(kernel(x.bfloat16()), reference(x.bfloat16())) < 1e-2


@pytest.mark.parametrize("rows, columns, tokens, group", [
    (3, 5, 1, 5),
    (17, 33, 3, 11),
    (65, 192, 1, 64),
    (33, 96, 40, 32),
    (40, 200, 2, 50),
])
def test_odd_shapes(cuda, rows, columns, tokens, group):
    two_level = QuantSpec(4, "group", group, "two-level")
    for spec in (two_level, QuantSpec(8, "channel"), QuantSpec(3, "channel")):
        layer = make_layer(rows, columns, spec, rank=min(2, rows, columns))
        kernel, reference = pair(cuda, layer, None, QuantSpec(8, "token"))
        x = torch.randn(1, tokens, columns, device=DEVICE)
        assert relative(kernel(x), reference(x)) < 1e-5, spec


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_are_the_same_bit_for_bit(cuda, bits):
    x = torch.randn(64, 100, device=DEVICE) * torch.exp(3 * torch.randn(64, 1, device=DEVICE))
    x[0] = 0
    x[1] = 4.0
    x[2] = -4.0
    x[3, :50] = 0.5 + torch.arange(50, device=DEVICE)  # ties
    smooth = torch.rand(100, device=DEVICE) + 0.5
    spec = QuantSpec(bits, "token")
    for factors in (None, smooth):
        codes, scale, zero = cuda.quantize_tokens(x, factors, spec.top)
        values = x if factors is None else x / factors
        signed, expected_scale, expected_zero = signed_codes(values, spec)
        assert torch.equal(scale, expected_scale[:, 0])
        assert torch.equal(zero, expected_zero[:, 0])
        assert torch.equal(codes, (signed + expected_zero).to(torch.uint8))


def test_sums_are_exact_even_where_they_are_largest(cuda):
    base = quantize(torch.ones(16, 4608), QuantSpec(7, "channel"))
    weight = integer_weight(QuantizedLayer(without_branch(base), None))
    codes = torch.full((2, 4608), 255, dtype=torch.uint8, device=DEVICE)
    scale = torch.ones(2, device=DEVICE)
    zero = torch.zeros(2, device=DEVICE)
    step = torch.ones(16, device=DEVICE)
    out = cuda.integer_linear(
        codes, scale, zero, weight.codes.to(DEVICE), None, None, 0, step,
        weight.sums.to(DEVICE), None, None, None, False)
    expected = torch.full((2, 16), 255 * 127 * 4608, dtype=torch.float32, device=DEVICE)
    assert torch.equal(out, expected)


def test_a_value_that_is_not_finite_is_not_hidden(cuda):
    layer = make_layer(8, 32, QuantSpec(4, "channel"), 0)
    kernel, _ = pair(cuda, layer, None, QuantSpec(8, "token"))
    x = torch.randn(1, 3, 32, device=DEVICE)
    x[0, 1, 5] = float("nan")
    x[0, 2, 7] = float("inf")
    finite = torch.isfinite(kernel(x)).all(-1)[0].tolist()
    assert finite == [True, False, False]


def test_a_weight_only_layer_gives_the_reference(cuda):
    base = quantize(torch.randn(60, 40), QuantSpec(8, "channel"))
    layer = QuantizedLayer(without_branch(base), None, None, torch.rand(60) + 0.5)
    weight = integer_weight(layer)
    x = torch.randn(3, 40, device=DEVICE)
    branch = weight.left.double() @ weight.right.double()
    dense = weight.codes.double() * weight.step[:, None] + branch
    int8 = cuda.Int8WeightOnly(weight, None).to(DEVICE)
    assert relative(int8(x).cpu(), x.cpu().double() @ dense.T) < 1e-6
    half = x.bfloat16()
    expanded = cuda.ExpandedWeightOnly(weight, None).to(DEVICE)
    assert relative(expanded(half).cpu(), half.cpu().double() @ dense.T) < 1e-2


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quant.integer import cuda

def build(kernel, types, constants, **options):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(key),): value for key, value in constants.items()}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    source = ASTSource(kernel, signature, values)
    return triton.compile(source, target=target, options=options).asm["ptx"]

types = {"x": "*bf16", "smooth": "*fp32", "codes": "*u8",
         "scale": "*fp32", "zero": "*fp32", "columns": "i32"}
codes = build(cuda._quantize_kernel, types, {"TOP": 255, "DIVIDES": True, "BLOCK": 2048})
assert "div.rn.f32" in codes and "div.full" not in codes

floats = dict.fromkeys(["low", "left", "sums", "step", "scale", "zero", "bias"], "*fp32")
whole = dict.fromkeys(["M", "N", "K", "GROUPS", "GROUP"], "i32")
for out, nibbles, rank, low, tile in (
        ("fp32", False, 16, "*fp32", 64),
        ("bf16", True, 32, "*fp32", 64),
        ("fp32", True, 0, "*u8", 32)):
    floats |= {"low": low, "left": low}
    types = {"codes": "*u8", "weight": "*u8" if nibbles else "*i8",
             "group_scale": "*i8", "group_zero": "*i8", **floats, "out": "*" + out, **whole}
    constants = {"NIBBLES": nibbles, "RANK": rank, "HAS_BIAS": rank > 0,
                 "BM": 128, "BN": 128, "BK": tile}
    ptx = build(cuda._linear_kernel, types, constants, num_warps=8, num_stages=3)
    assert "s32.s8.s8" in ptx  # the tensor cores' int8 product
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_real_gpus(capability, tmp_path):
    """To machine code, which needs no GPU; running them there is another matter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
