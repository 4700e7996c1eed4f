"""Integer products on NVIDIA GPUs: Triton kernels for the codes and for the product, 4-bit weights unpacked in the kernel.

Tile sizes are tuned on a GPU and fixed under Triton's interpreter (``TRITON_INTERPRET=1``), which runs the kernels anywhere.
"""
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from quant.integer.weight import IntegerWeight, Nibbles
from quant.layers.linear import float32_copy, rescale, split_branch
from quant.layers.weight_only import WeightOnly
from quant.numerics.uniform import QuantSpec, signed_codes

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds a small float32 to the nearest integer, ties to even
TILE_K = (64, 32)  # inputs per tile of 4-bit weights; a tile must not cross a group


@triton.jit
def _quantize_kernel(x, smooth, codes, scale, zero, columns, TOP: tl.constexpr, DIVIDES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    if DIVIDES:
        values = tl.div_rn(values, tl.load(smooth + at, mask=inside, other=1.0))
    low = tl.minimum(tl.min(values, 0), 0.0)
    high = tl.maximum(tl.max(values, 0), 0.0)
    s = (high - low) * (1.0 / TOP)
    s = tl.where(s == 0, 1.0, s) + tl.sum(values * 0.0, 0)  # NaN where a value is not finite
    z = -((tl.div_rn(low, s) + ROUND) - ROUND)
    q = tl.minimum((tl.div_rn(values, s) + ROUND) - ROUND, TOP - z) + z
    tl.store(codes + row * columns + at, q.to(tl.int32).to(tl.uint8), mask=inside)
    tl.store(scale + row, s)
    tl.store(zero + row, z)


@triton.jit
def _linear_kernel(codes, weight, group_scale, group_zero, low, left, sums, step, scale, zero, bias, out, M, N, K, GROUPS, GROUP,
                   NIBBLES: tl.constexpr, RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``out = ((qx - zx) W^T) step sx + low left^T + bias``, tile (BM, BN) of (M, N); W (N, K) int8 or halves of 4 bits."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    in_rows, in_cols = rows < M, cols < N
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), dtype=tl.int32)
    if NIBBLES:
        half = K // 2
        for start in range(0, half, BK):
            packed = tl.load(weight + cols[None, :] * half + start + k[:, None], mask=in_cols[None, :], other=0).to(tl.int32)  # (BK, BN)
            for side in tl.static_range(2):
                first = start + side * half
                group = cols * GROUPS + first // GROUP
                times = tl.load(group_scale + group, mask=in_cols, other=0).to(tl.int32)
                offset = tl.load(group_zero + group, mask=in_cols, other=0).to(tl.int32)
                nibble = (packed >> (4 * side)) & 15
                b = ((nibble - offset[None, :]) * times[None, :]).to(tl.int8)
                a = tl.load(codes + rows[:, None] * K + first + k[None, :], mask=in_rows[:, None], other=128)
                total = tl.dot((a.to(tl.int32) - 128).to(tl.int8), b, total)
    else:
        for start in range(0, K, BK):
            inside = start + k < K
            b = tl.load(weight + cols[None, :] * K + start + k[:, None], mask=in_cols[None, :] & inside[:, None], other=0)
            a = tl.load(codes + rows[:, None] * K + start + k[None, :], mask=in_rows[:, None] & inside[None, :], other=128)
            total = tl.dot((a.to(tl.int32) - 128).to(tl.int8), b, total)
    s = tl.load(scale + rows, mask=in_rows, other=0.0)
    z = tl.load(zero + rows, mask=in_rows, other=0.0) - 128.0
    y = total.to(tl.float32) - z[:, None] * tl.load(sums + cols, mask=in_cols, other=0.0)[None, :]
    y = y * tl.load(step + cols, mask=in_cols, other=0.0)[None, :] * s[:, None]
    if RANK > 0:
        r = tl.arange(0, RANK)
        left_tile = tl.load(left + cols[None, :] * RANK + r[:, None], mask=in_cols[None, :], other=0.0)  # (RANK, BN)
        low_tile = tl.load(low + rows[:, None] * RANK + r[None, :], mask=in_rows[:, None], other=0.0)
        if out.dtype.element_ty == tl.float32:
            y = tl.dot(low_tile, left_tile, y, input_precision="ieee")
        else:
            y = tl.dot(low_tile, left_tile, y, input_precision="tf32")
    if HAS_BIAS:
        y += tl.load(bias + cols, mask=in_cols, other=0.0)[None, :]
    tl.store(out + rows[:, None] * N + cols[None, :], y.to(out.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@cache
def _tuned(nibbles: bool):
    """The product kernel with its tiles tuned per shape; BK of 4-bit weights is given by the caller."""
    configs = [triton.Config({"BM": bm, "BN": bn} | ({} if nibbles else {"BK": bk}), num_warps=warps, num_stages=stages)
               for bm, bn, warps in ((64, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8), (128, 64, 4), (32, 64, 4))
               for bk, stages in (((64, 3), (64, 4)) if nibbles else ((64, 4), (128, 3), (128, 4)))]
    return triton.autotune(configs, key=["M", "N", "K"])(_linear_kernel)


def _interpreted() -> bool:
    return not isinstance(_linear_kernel, triton.JITFunction)


@torch.library.custom_op("ditas::quantize_tokens", mutates_args=())
def quantize_tokens(x: Tensor, smooth: Tensor | None, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (M, I) uint8 of ``x / smooth`` (M, I), and scale and zero (M,) float32, one range per row."""
    rows, columns = x.shape
    codes = torch.empty_like(x, dtype=torch.uint8)
    scale, zero = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    _quantize_kernel[(rows,)](x, x if smooth is None else smooth, codes, scale, zero, columns, TOP=top, DIVIDES=smooth is not None,
                              BLOCK=triton.next_power_of_2(columns))
    return codes, scale, zero


@quantize_tokens.register_fake
def _(x, smooth, top):
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("ditas::integer_linear", mutates_args=())
def integer_linear(codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, group_scale: Tensor | None, group_zero: Tensor | None, tile: int,
                   step: Tensor, sums: Tensor, low: Tensor | None, left: Tensor | None, bias: Tensor | None, bfloat16: bool) -> Tensor:
    """``sx (qx - zx) W^T step + low left^T + bias``, (M, O), float32 or bfloat16.

    Args:
        codes: (M, I) uint8; scale, zero: (M,).
        weight: (O, I) int8, or (O, I/2) uint8 as ``Nibbles`` with ``group_scale`` and ``group_zero`` (O, G), read ``tile`` inputs at a time.
        step, sums: (O,); low: (M, r) float32; left: (O, r), r a power of two of at least 16.
    """
    (rows, columns), outputs = codes.shape, len(weight)
    out = codes.new_empty(rows, outputs, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    nibbles, groups = group_scale is not None, 1 if group_scale is None else group_scale.shape[1]
    arguments = (codes, weight, group_scale if nibbles else weight, group_zero if nibbles else weight, codes if low is None else low,
                 codes if left is None else left, sums, step, scale, zero, sums if bias is None else bias, out, rows, outputs, columns, groups, columns // groups)
    flags = {"NIBBLES": nibbles, "RANK": 0 if left is None else left.shape[1], "HAS_BIAS": bias is not None} | ({"BK": tile} if nibbles else {})

    def grid(meta):
        return triton.cdiv(rows, meta["BM"]), triton.cdiv(outputs, meta["BN"])

    if _interpreted():
        _linear_kernel[grid](*arguments, **({"BK": 64} | flags), BM=32, BN=32)
    else:
        _tuned(nibbles)[grid](*arguments, **flags)
    return out


@integer_linear.register_fake
def _(codes, scale, zero, weight, group_scale, group_zero, tile, step, sums, low, left, bias, bfloat16):
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=torch.bfloat16 if bfloat16 else torch.float32)


def _tile(half: Nibbles | None) -> int:
    """Inputs per tile of packed weights, 0 where they do not fit tiles."""
    if half is None:
        return 0
    columns = half.codes.shape[1]
    group = 2 * columns // half.zero.shape[1]
    return next((size for size in TILE_K if columns % size == 0 and group % size == 0), 0)


class TritonLinear(nn.Module):
    """``QuantLinear`` in integers; weights of at most 4 bits stay packed wherever their groups fit the tiles.

    Buffers: ``weight`` (O, I) int8 or (O, I/2) uint8 with ``group_scale`` and ``group_zero`` (O, G) int8; ``right`` (r, I) int8 and
    ``left`` (O, r), r filled with zeros to a power of two of at least 16; ``step``, ``sums``, ``bias`` (O,), ``smooth`` (I,), float32.
    """

    def __init__(self, weight: IntegerWeight, half: Nibbles | None, bias: Tensor | None, smooth: Tensor | None, act: QuantSpec):
        super().__init__()
        self.tile, rank = _tile(half), len(weight.right)
        fill = triton.next_power_of_2(max(rank, 16)) - rank if rank else 0
        right = F.pad(weight.right, (0, 0, 0, fill))
        packed = self.tile > 0
        for name, value in {
                "weight": half.codes if packed else weight.codes, "step": weight.step, "sums": weight.sums[:len(weight.codes)],
                "group_scale": half.scale.squeeze(-1) if packed else None, "group_zero": half.zero.squeeze(-1) if packed else None,
                "left": F.pad(weight.left, (0, fill)) if rank else None, "right": right if rank else None,
                "right_sums": right.sum(1, dtype=torch.int32).float() if rank else None, "ones": torch.ones(len(right)) if rank else None,
                "bias": float32_copy(bias), "smooth": smooth}.items():
            self.register_buffer(name, None if value is None else value.contiguous())
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        codes, scale, zero = self.codes(x)
        low = None
        if self.left is not None:
            low = integer_linear(codes, scale, zero, self.right, None, None, 0, self.ones, self.right_sums, None, None, None, False)
        y = integer_linear(codes, scale, zero, self.weight, self.group_scale, self.group_zero, self.tile, self.step, self.sums, low, self.left,
                           self.bias, x.dtype == torch.bfloat16)
        return y.unflatten(0, x.shape[:-1])

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (M, I) uint8, scale and zero (M,) of all tokens."""
        if self.act.granularity == "token":
            return quantize_tokens(x.flatten(0, -2).contiguous(), self.smooth, self.act.top)
        values = x.float() if self.smooth is None else x.float() / self.smooth
        signed, scale, zero = signed_codes(values, self.act)
        tokens = x.shape[:-1]
        return ((signed + zero).to(torch.uint8).flatten(0, -2), scale.expand(*tokens, 1).flatten().contiguous(),
                zero.expand(*tokens, 1).flatten().contiguous())


class Int8WeightOnly(WeightOnly):
    """Int8 weights in memory, a float32 product: the digits are exact in TF32 too."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None):
        super().__init__(weight.sums, weight.step, weight.left, bias)
        self.register_buffer("weight", torch.cat([weight.codes, weight.right]))

    def product(self, digits: Tensor) -> Tensor:
        return F.linear(digits.float(), self.weight.float())


class ExpandedWeightOnly(nn.Module):
    """A linear with int8 weights and a bfloat16 input (N, I); the weight is converted, which is exact, in every call."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None):
        super().__init__()
        for name, value in {"weight": torch.cat([weight.codes, weight.right]), "step": weight.step, "left": weight.left, "bias": float32_copy(bias)}.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return rescale(*split_branch(F.linear(x, self.weight.to(x.dtype)), self.left), self.step, self.left, None, self.bias).to(x.dtype)
