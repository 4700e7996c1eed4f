"""Codes of a few bits as a dense stream of bytes, and tensors that are held so."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.numerics.spec import QuantSpec
from quant.numerics.stowed import pack, stow, unpack
from quant.numerics.uniform import quantize
from quant.weights.low_rank import LowRankWeight
from quant.weights.stowed import stow_weight
from quant.weights.two_level import find_steps, quantize_two_level


@given(st.integers(1, 8), st.integers(0, 200), st.integers(0, 2 ** 32 - 1))
def test_packing_is_lossless_and_dense(bits, count, seed):
    rng = np.random.default_rng(seed)
    codes = torch.tensor(rng.integers(0, 2 ** bits, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, (count,)), codes)
    # The bit stream as one big integer.
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert int.from_bytes(packed.numpy().tobytes(), "little") == stream


def test_a_stream_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="expected 6 bytes"):
        unpack(torch.zeros(5, dtype=torch.uint8), 4, (3, 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_stowed_tensor_is_the_same(bits):
    weight = quantize(torch.randn(6, 16), QuantSpec(bits, "group", 8))
    assert_same(stow(weight), weight)
    assert torch.equal(stow(weight).dequantize(), weight.dequantize())


def assert_same(stowed, weight):
    for name in ("codes", "scale", "zero"):
        found, expected = getattr(stowed, name), getattr(weight, name)
        assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_two_level_scales_take_a_byte_and_zero_points_a_code():
    spec = QuantSpec(4, "group", 8, "two-level")
    values = torch.randn(6, 16)
    weight = quantize_two_level(values, spec, None, find_steps(values, spec))
    stowed = stow(weight)
    assert_same(stowed, weight)
    assert torch.equal(stowed.step, weight.step)
    kept = [value for value in vars(stowed).values() if isinstance(value, torch.Tensor)]
    codes, groups, outputs = 6 * 16 // 2, 6 * 2, 6
    assert sum(value.nbytes for value in kept) == codes + groups + groups // 2 + 2 * outputs


def test_zero_points_that_are_no_codes_are_kept():
    # All values lie far off zero, so that their zero points do, too.
    weight = quantize(10 + torch.rand(6, 16), QuantSpec(4, "group", 8, "free"))
    assert weight.zero.min() < 0
    assert_same(stow(weight), weight)


@pytest.mark.parametrize("is_integer", [True, False])
def test_a_stowed_branch_is_the_same(is_integer):
    left, right = torch.randn(6, 3), torch.randn(3, 16)
    if is_integer:
        left, right = left.bfloat16().float(), (40 * right).round()
    weight = LowRankWeight(quantize(torch.randn(6, 16), QuantSpec(4, "channel")), left, right)
    stowed = stow_weight(weight)
    assert torch.equal(stowed.left, left) and torch.equal(stowed.right, right)
    assert torch.equal(stowed.dense(), weight.dense())
    size = stowed.stored_left.nbytes + stowed.stored_right.nbytes
    assert size == (2 * 18 + 48 if is_integer else 4 * 66)


@pytest.mark.parametrize("left, right", [(1.0, 300.0), (1 / 3, 2.0)])
def test_a_branch_of_whole_numbers_that_small_types_cannot_hold_is_kept(left, right):
    left, right = torch.full((6, 3), left), torch.full((3, 16), right)
    weight = LowRankWeight(quantize(torch.randn(6, 16), QuantSpec(4, "channel")), left, right)
    stowed = stow_weight(weight)
    assert torch.equal(stowed.left, left) and torch.equal(stowed.right, right)


def test_zero_points_beyond_int32_are_kept():
    values = torch.full((2, 8), 10.0)
    values[:, 1] = values[:, 1].nextafter(torch.tensor(11.0))
    weight = quantize(values, QuantSpec(8, "channel", convention="free"))
    assert weight.zero.min() < -2 ** 31
    assert_same(stow(weight), weight)


def test_a_stowed_tensor_takes_other_scales():
    weight = quantize(torch.randn(8, 16), QuantSpec(4, "strided", 4))
    factors = torch.rand(16) + 0.5
    expected = weight.scale_columns(factors).dequantize()
    assert torch.equal(stow(weight).scale_columns(factors).dequantize(), expected)
