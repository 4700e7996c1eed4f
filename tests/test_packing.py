"""Codes of a few bits as a dense stream of bytes."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.numerics.spec import QuantSpec
from quant.numerics.stowed import pack, stow, unpack
from quant.numerics.uniform import quantize


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


@pytest.mark.parametrize("bits, bytes_kept", [(4, 6 * 16 // 2), (3, 6 * 16 * 3 // 8), (8, 6 * 16)])
def test_stowed_codes_are_the_same(bits, bytes_kept):
    torch.manual_seed(0)
    weight = quantize(torch.randn(6, 16), QuantSpec(bits, "group", 8))
    stowed = stow(weight)
    assert torch.equal(stowed.codes, weight.codes)
    assert torch.equal(stowed.dequantize(), weight.dequantize())
    kept = [value for value in vars(stowed).values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in kept if value.dtype == torch.uint8) == bytes_kept


def test_stowed_codes_take_other_scales():
    weight = quantize(torch.randn(8, 16), QuantSpec(4, "strided", 4))
    stowed, factors = stow(weight), torch.rand(16) + 0.5
    doubled = replace(stowed, scale=2 * stowed.scale)
    assert torch.equal(doubled.dequantize(), 2 * weight.dequantize())
    expected = weight.scale_columns(factors).dequantize()
    assert torch.equal(stowed.scale_columns(factors).dequantize(), expected)
