"""The Triton kernels under Triton's interpreter, which runs them on any machine, or on a GPU where there is one."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import relative
from test_integer import layer

from config import RECIPES
from quant.integer.linear import ReferenceLinear
from quant.integer.weight import integer_weight, nibbles
from quant.layers.quantised import QuantizedLayer
from quant.numerics.uniform import QuantSpec, quantize, signed_codes
from quant.recipe import act_spec, weight_spec
from quant.weights.low_rank import without_branch

pytest.importorskip("triton", reason="Triton has no package for this platform")
ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def cuda():
    return importlib.import_module("quant.integer.cuda")


def pair(cuda, made, bias, act):
    weight = integer_weight(made)
    return (cuda.TritonLinear(weight, nibbles(made), bias, made.smoothing.factors, act).to(DEVICE), ReferenceLinear(weight, bias, made.smoothing.factors, act).to(DEVICE))


@pytest.mark.parametrize("recipe_name", ["rtn", "smoothquant", "ditas", "ditas-plus"])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_outputs_are_those_of_the_reference(cuda, recipe_name, bits):
    recipe = RECIPES[recipe_name]
    made = layer(80, 128, weight_spec(recipe, bits), 3 if recipe.rank != 0 else 0)
    bias, x = torch.randn(80), 3 * torch.randn(2, 7, 128, device=DEVICE)
    kernel, reference = pair(cuda, made, bias, act_spec(recipe, 8))
    assert (kernel.tile > 0) == (bits <= 4)
    assert relative(kernel(x), reference(x)) < 1e-5
    assert relative(kernel(x.bfloat16()), reference(x.bfloat16())) < 1e-2


@pytest.mark.parametrize("rows, columns, tokens, group", [(3, 5, 1, 5), (17, 33, 3, 11), (65, 192, 1, 64), (33, 96, 40, 32), (40, 200, 2, 50)])
def test_odd_shapes(cuda, rows, columns, tokens, group):
    for spec in (QuantSpec(4, "group", group, "two-level"), QuantSpec(8, "channel"), QuantSpec(3, "channel")):
        kernel, reference = pair(cuda, layer(rows, columns, spec, rank=min(2, rows, columns)), None, QuantSpec(8, "token"))
        x = torch.randn(1, tokens, columns, device=DEVICE)
        assert relative(kernel(x), reference(x)) < 1e-5, spec


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_are_the_same_bit_for_bit(cuda, bits):
    x = torch.randn(64, 100, device=DEVICE) * torch.exp(3 * torch.randn(64, 1, device=DEVICE))
    x[0], x[1], x[2] = 0, 4.0, -4.0
    x[3, :50] = 0.5 + torch.arange(50, device=DEVICE)  # ties
    smooth, spec = torch.rand(100, device=DEVICE) + 0.5, QuantSpec(bits, "token")
    for factors in (None, smooth):
        codes, scale, zero = cuda.quantize_tokens(x, factors, spec.top)
        signed, expected_scale, expected_zero = signed_codes(x if factors is None else x / factors, spec)
        assert torch.equal(scale, expected_scale[:, 0]) and torch.equal(zero, expected_zero[:, 0])
        assert torch.equal(codes, (signed + expected_zero).to(torch.uint8))


def test_sums_are_exact_even_where_they_are_largest(cuda):
    made = QuantizedLayer(without_branch(quantize(torch.ones(16, 4608), QuantSpec(7, "channel"))), None)
    weight = integer_weight(made)
    codes, ones = torch.full((2, 4608), 255, dtype=torch.uint8, device=DEVICE), torch.ones(16, device=DEVICE)
    out = cuda.integer_linear(codes, torch.ones(2, device=DEVICE), torch.zeros(2, device=DEVICE), weight.codes.to(DEVICE), None, None, 0, ones,
                              weight.sums.to(DEVICE), None, None, None, False)
    assert torch.equal(out, torch.full((2, 16), 255 * 127 * 4608, dtype=torch.float32, device=DEVICE))


def test_a_value_that_is_not_finite_is_not_hidden(cuda):
    kernel, _ = pair(cuda, layer(8, 32, QuantSpec(4, "channel"), 0), None, QuantSpec(8, "token"))
    x = torch.randn(1, 3, 32, device=DEVICE)
    x[0, 1, 5], x[0, 2, 7] = float("nan"), float("inf")
    finite = torch.isfinite(kernel(x)).all(-1)[0].tolist()
    assert finite == [True, False, False]


def test_a_weight_only_layer_gives_the_reference(cuda):
    made = QuantizedLayer(without_branch(quantize(torch.randn(60, 40), QuantSpec(8, "channel"))), None, None, torch.rand(60) + 0.5)
    weight, x = integer_weight(made), torch.randn(3, 40, device=DEVICE)
    dense = weight.codes.double() * weight.step[:, None] + weight.left.double() @ weight.right.double()
    assert relative(cuda.Int8WeightOnly(weight, None).to(DEVICE)(x).cpu(), x.cpu().double() @ dense.T) < 1e-6
    half = x.bfloat16()
    assert relative(cuda.ExpandedWeightOnly(weight, None).to(DEVICE)(half).cpu(), half.cpu().double() @ dense.T) < 1e-2


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quant.integer import cuda

def build(kernel, types, constants, **options):
    names = kernel.arg_names
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names}, {(names.index(key),): value for key, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options).asm["ptx"]

floats = dict.fromkeys(["low", "left", "sums", "step", "scale", "zero", "bias"], "*fp32")
whole = dict.fromkeys(["M", "N", "K", "GROUPS", "GROUP"], "i32")
codes = build(cuda._quantize_kernel, {"x": "*bf16", "smooth": "*fp32", "codes": "*u8", "scale": "*fp32", "zero": "*fp32", "columns": "i32"},
              {"TOP": 255, "DIVIDES": True, "BLOCK": 2048})
assert "div.rn.f32" in codes and "div.full" not in codes
for out, nibbles, rank, low, tile in (("fp32", False, 16, "*fp32", 64), ("bf16", True, 32, "*fp32", 64), ("fp32", True, 0, "*u8", 32)):
    floats |= {"low": low, "left": low}
    ptx = build(cuda._linear_kernel, {"codes": "*u8", "weight": "*u8" if nibbles else "*i8", "group_scale": "*i8", "group_zero": "*i8", **floats, "out": "*" + out, **whole},
                {"NIBBLES": nibbles, "RANK": rank, "HAS_BIAS": rank > 0, "BM": 128, "BN": 128, "BK": tile}, num_warps=8, num_stages=3)
    assert "s32.s8.s8" in ptx  # the tensor cores' int8 product
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_real_gpus(capability, tmp_path):
    """To machine code, which needs no GPU; running them there is another matter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE, str(capability)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
