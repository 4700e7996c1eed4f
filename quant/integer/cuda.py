"""Integer products on NVIDIA GPUs: Triton kernels for the codes and for the product.

4-bit weights are unpacked in the kernel. Tile sizes are tuned on a GPU and fixed under Triton's
interpreter (``TRITON_INTERPRET=1``), which runs the kernels anywhere.
"""
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from quant.integer.weight import IntegerWeight, Nibbles
from quant.layers.buffers import register_buffers
from quant.layers.linear import float32_copy, rescale, split_branch
from quant.layers.weight_only import WeightOnly
from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import signed_codes

# 1.5 * 2^23: adding and subtracting it rounds a small float32 to the nearest integer, ties to even.
ROUND = tl.constexpr(12582912.0)
# Inputs per tile of 4-bit weights; a tile must not cross a group.
TILE_K = (64, 32)
# Ranks of the low-rank branch are filled up to this or a larger power of two.
SMALLEST_RANK = 16

# What is tuned: rows and columns of an output tile, and warps,
TILES = ((64, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8), (128, 64, 4), (32, 64, 4))
# inputs per tile of int8 weights, and stages,
INT8_PIPELINES = ((64, 4), (128, 3), (128, 4))
# and stages with 4-bit weights.
NIBBLE_STAGES = (3, 4)
# Rows, columns and inputs of a tile under the interpreter.
INTERPRETED_TILE = {"BM": 32, "BN": 32, "BK": 64}


@triton.jit
def _quantize_kernel(
        x,                      # (M, columns) float32 or bfloat16
        smooth,                 # (columns,) float32, not read unless DIVIDES
        codes,                  # (M, columns) uint8, written
        scale,                  # (M,) float32, written
        zero,                   # (M,) float32, written
        columns,
        TOP: tl.constexpr,      # the largest code
        DIVIDES: tl.constexpr,  # whether x is divided by smooth
        BLOCK: tl.constexpr,    # a power of two, columns or more
):
    """Quantise one row of ``x / smooth``, with its own range."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    if DIVIDES:
        values = tl.div_rn(values, tl.load(smooth + at, mask=inside, other=1.0))
    low = tl.minimum(tl.min(values, 0), 0.0)
    high = tl.maximum(tl.max(values, 0), 0.0)
    s = (high - low) * (1.0 / TOP)
    # NaN where a value is not finite.
    s = tl.where(s == 0, 1.0, s) + tl.sum(values * 0.0, 0)
    z = -((tl.div_rn(low, s) + ROUND) - ROUND)
    q = tl.minimum((tl.div_rn(values, s) + ROUND) - ROUND, TOP - z) + z
    tl.store(codes + row * columns + at, q.to(tl.int32).to(tl.uint8), mask=inside)
    tl.store(scale + row, s)
    tl.store(zero + row, z)


@triton.jit
def _linear_kernel(
        codes,                   # (M, K) uint8, qx
        weight,                  # (N, K) int8, or (N, K/2) uint8 as in Nibbles
        group_scale,             # (N, GROUPS) int8, not read unless NIBBLES
        group_zero,              # (N, GROUPS) int8, not read unless NIBBLES
        low,                     # (M, RANK) float32, not read if RANK is 0
        left,                    # (N, RANK) float32, not read if RANK is 0
        sums,                    # (N,) float32, of the weight's rows
        step,                    # (N,) float32
        scale,                   # (M,) float32, sx
        zero,                    # (M,) float32, zx
        bias,                    # (N,) float32, not read unless HAS_BIAS
        out,                     # (M, N) float32 or bfloat16, written
        M,                       # tokens
        N,                       # outputs
        K,                       # inputs
        GROUPS,                  # of a row of 4-bit weights
        GROUP,                   # inputs per group
        NIBBLES: tl.constexpr,   # whether the weight has 4 bits
        RANK: tl.constexpr,      # of the low-rank branch
        HAS_BIAS: tl.constexpr,
        BM: tl.constexpr,        # tokens, outputs and inputs per tile
        BN: tl.constexpr,
        BK: tl.constexpr,
):
    """Compute ``out = ((qx - zx) W^T) step sx + low left^T + bias``, one tile (BM, BN) of it."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    in_rows, in_cols = rows < M, cols < N
    k = tl.arange(0, BK)

    # Products of codes less 128, which fit int8, with the weight.
    total = tl.zeros((BM, BN), dtype=tl.int32)
    if NIBBLES:
        half = K // 2
        for start in range(0, half, BK):
            at = weight + cols[None, :] * half + start + k[:, None]
            packed = tl.load(at, mask=in_cols[None, :], other=0).to(tl.int32)  # (BK, BN)
            for side in tl.static_range(2):
                first = start + side * half
                group = cols * GROUPS + first // GROUP
                times = tl.load(group_scale + group, mask=in_cols, other=0).to(tl.int32)
                offset = tl.load(group_zero + group, mask=in_cols, other=0).to(tl.int32)
                nibble = (packed >> (4 * side)) & 15
                b = ((nibble - offset[None, :]) * times[None, :]).to(tl.int8)
                at = codes + rows[:, None] * K + first + k[None, :]
                a = tl.load(at, mask=in_rows[:, None], other=128)
                total = tl.dot((a.to(tl.int32) - 128).to(tl.int8), b, total)
    else:
        for start in range(0, K, BK):
            inside = start + k < K
            at = weight + cols[None, :] * K + start + k[:, None]
            b = tl.load(at, mask=in_cols[None, :] & inside[:, None], other=0)
            at = codes + rows[:, None] * K + start + k[None, :]
            a = tl.load(at, mask=in_rows[:, None] & inside[None, :], other=128)
            total = tl.dot((a.to(tl.int32) - 128).to(tl.int8), b, total)

    # Zero points, steps and scales.
    s = tl.load(scale + rows, mask=in_rows, other=0.0)
    z = tl.load(zero + rows, mask=in_rows, other=0.0) - 128.0
    y = total.to(tl.float32) - z[:, None] * tl.load(sums + cols, mask=in_cols, other=0.0)[None, :]
    y = y * tl.load(step + cols, mask=in_cols, other=0.0)[None, :] * s[:, None]

    # The low-rank branch and the bias.
    if RANK > 0:
        r = tl.arange(0, RANK)
        at = left + cols[None, :] * RANK + r[:, None]
        left_tile = tl.load(at, mask=in_cols[None, :], other=0.0)  # (RANK, BN)
        at = low + rows[:, None] * RANK + r[None, :]
        low_tile = tl.load(at, mask=in_rows[:, None], other=0.0)    # (BM, RANK)
        if out.dtype.element_ty == tl.float32:
            y = tl.dot(low_tile, left_tile, y, input_precision="ieee")
        else:
            y = tl.dot(low_tile, left_tile, y, input_precision="tf32")
    if HAS_BIAS:
        y += tl.load(bias + cols, mask=in_cols, other=0.0)[None, :]
    at = out + rows[:, None] * N + cols[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@cache
def _tuned(nibbles: bool):
    """Make the product kernel with its tiles tuned per shape.

    Of 4-bit weights the caller gives BK.
    """
    configs = []
    for rows, columns, warps in TILES:
        tile = {"BM": rows, "BN": columns}
        if nibbles:
            for stages in NIBBLE_STAGES:
                configs.append(triton.Config(dict(tile), num_warps=warps, num_stages=stages))
        else:
            for inputs, stages in INT8_PIPELINES:
                configs.append(
                    triton.Config(tile | {"BK": inputs}, num_warps=warps, num_stages=stages))
    return triton.autotune(configs, key=["M", "N", "K"])(_linear_kernel)


def _interpreted() -> bool:
    return not isinstance(_linear_kernel, triton.JITFunction)


def _pointer(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Give a kernel something to point to where a tensor is absent and never read."""
    return stand_in if tensor is None else tensor


def _output_type(bfloat16: bool) -> torch.dtype:
    return torch.bfloat16 if bfloat16 else torch.float32


@torch.library.custom_op("ditas::quantize_tokens", mutates_args=())
def quantize_tokens(x: Tensor, smooth: Tensor | None, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise ``x / smooth``, one range per row.

    Args:
        x: (M, I), contiguous.
        smooth: (I,) float32, or None for ones.
        top: the largest code.

    Returns:
        Codes (M, I) uint8, and scale and zero point, (M,) float32.
    """
    rows, columns = x.shape
    codes = torch.empty_like(x, dtype=torch.uint8)
    scale = x.new_empty(rows, dtype=torch.float32)
    zero = x.new_empty(rows, dtype=torch.float32)
    _quantize_kernel[(rows,)](
        x, _pointer(smooth, x), codes, scale, zero, columns,
        TOP=top, DIVIDES=smooth is not None, BLOCK=triton.next_power_of_2(columns))
    return codes, scale, zero


@quantize_tokens.register_fake
def _(x, smooth, top):
    codes = torch.empty_like(x, dtype=torch.uint8)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    zero = x.new_empty(x.shape[0], dtype=torch.float32)
    return codes, scale, zero


@torch.library.custom_op("ditas::integer_linear", mutates_args=())
def integer_linear(
        codes: Tensor,               # (M, I) uint8, qx
        scale: Tensor,               # (M,) float32, sx
        zero: Tensor,                # (M,) float32, zx
        weight: Tensor,              # (O, I) int8, or (O, I/2) uint8 as in Nibbles
        group_scale: Tensor | None,  # (O, G) int8, of 4-bit weights
        group_zero: Tensor | None,   # (O, G) int8, of 4-bit weights
        tile: int,                   # how many inputs of 4-bit weights are read at a time
        step: Tensor,                # (O,) float32
        sums: Tensor,                # (O,) float32, of the weight's rows
        low: Tensor | None,          # (M, r) float32, r a power of two of at least SMALLEST_RANK
        left: Tensor | None,         # (O, r) float32
        bias: Tensor | None,         # (O,) float32
        bfloat16: bool,              # the type of the outputs, else float32
) -> Tensor:
    """Compute ``sx (qx - zx) W^T step + low left^T + bias``, (M, O), float32 or bfloat16."""
    rows, columns = codes.shape
    outputs = len(weight)
    nibbles = group_scale is not None
    groups = group_scale.shape[1] if nibbles else 1
    out = codes.new_empty(rows, outputs, dtype=_output_type(bfloat16))
    # Pointers, then sizes, as the kernel takes them.
    arguments = (
        codes, weight, _pointer(group_scale, weight), _pointer(group_zero, weight),
        _pointer(low, codes), _pointer(left, codes), sums, step, scale, zero,
        _pointer(bias, sums), out, rows, outputs, columns, groups, columns // groups)
    flags = {
        "NIBBLES": nibbles,
        "RANK": 0 if left is None else left.shape[1],
        "HAS_BIAS": bias is not None,
    }
    if nibbles:
        flags["BK"] = tile

    def grid(meta):
        return triton.cdiv(rows, meta["BM"]), triton.cdiv(outputs, meta["BN"])

    if _interpreted():
        _linear_kernel[grid](*arguments, **(INTERPRETED_TILE | flags))
    else:
        _tuned(nibbles)[grid](*arguments, **flags)
    return out


@integer_linear.register_fake
def _(codes, scale, zero, weight, group_scale, group_zero, tile, step, sums, low, left, bias,
      bfloat16):
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=_output_type(bfloat16))


def _tile(half: Nibbles | None) -> int:
    """Find how many inputs of packed weights make a tile; 0 where they do not fit tiles."""
    if half is None:
        return 0
    columns = half.codes.shape[1]
    group = 2 * columns // half.zero.shape[1]
    for size in TILE_K:
        if columns % size == 0 and group % size == 0:
            return size
    return 0


def _weight_buffers(codes: Tensor, half: Nibbles | None) -> dict[str, Tensor | None]:
    """Make the buffers of a weight of int8 ``codes``, packed at 4 bits where ``half`` is given."""
    if half is None:
        return {"weight": codes.contiguous(), "group_scale": None, "group_zero": None}
    return {
        "weight": half.codes.contiguous(),
        "group_scale": half.scale.squeeze(-1).contiguous(),
        "group_zero": half.zero.squeeze(-1).contiguous(),
    }


def _branch_buffers(weight: IntegerWeight) -> dict[str, Tensor | None]:
    """Make the buffers of the low-rank branch, filled with zeros up to a rank of the kernel's.

    Without a branch all of them are None.
    """
    rank = len(weight.right)
    if rank == 0:
        return dict.fromkeys(("left", "right", "right_sums", "ones"))
    fill = triton.next_power_of_2(max(rank, SMALLEST_RANK)) - rank
    right = F.pad(weight.right, (0, 0, 0, fill))
    return {
        "left": F.pad(weight.left, (0, fill)).contiguous(),
        "right": right.contiguous(),
        "right_sums": right.sum(1, dtype=torch.int32).float(),
        "ones": torch.ones(len(right)),
    }


class TritonLinear(nn.Module):
    """``QuantLinear`` in integers; weights of at most 4 bits stay packed where they fit the tiles.

    Buffers:
        weight: (O, I) int8, or (O, I/2) uint8 with ``group_scale`` and ``group_zero`` (O, G) int8.
        right, left: (r, I) int8 and (O, r) float32, or None without a low-rank branch.
        right_sums, ones: (r,) float32, or None.
        step, sums, bias: (O,) float32.
        smooth: (I,) float32, or None for ones.
    """

    def __init__(
            self, weight: IntegerWeight, half: Nibbles | None, bias: Tensor | None,
            smooth: Tensor | None, act: QuantSpec):
        super().__init__()
        self.act = act
        self.tile = _tile(half)
        packed = half if self.tile else None
        register_buffers(
            self,
            **_weight_buffers(weight.codes, packed),
            **_branch_buffers(weight),
            step=weight.step.contiguous(),
            sums=weight.sums[:len(weight.codes)],
            bias=float32_copy(bias),
            smooth=None if smooth is None else smooth.contiguous(),
        )

    def forward(self, x: Tensor) -> Tensor:
        codes, scale, zero = self.codes(x)
        low = None
        if self.left is not None:
            low = integer_linear(
                codes, scale, zero, self.right, None, None, 0, self.ones, self.right_sums,
                None, None, None, False)
        y = integer_linear(
            codes, scale, zero, self.weight, self.group_scale, self.group_zero, self.tile,
            self.step, self.sums, low, self.left, self.bias, x.dtype == torch.bfloat16)
        return y.unflatten(0, x.shape[:-1])

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise all tokens: codes (M, I) uint8, and scale and zero point, (M,) float32."""
        if self.act.granularity == "token":
            return quantize_tokens(x.flatten(0, -2).contiguous(), self.smooth, self.act.top)
        values = x.float() if self.smooth is None else x.float() / self.smooth
        signed, scale, zero = signed_codes(values, self.act)
        codes = (signed + zero).to(torch.uint8).flatten(0, -2)
        tokens = x.shape[:-1]
        scale = scale.expand(*tokens, 1).flatten().contiguous()
        zero = zero.expand(*tokens, 1).flatten().contiguous()
        return codes, scale, zero


class Int8WeightOnly(WeightOnly):
    """A weight-only linear with int8 weights in memory and a float32 product.

    The digits are exact in TF32 too.
    """

    def __init__(self, weight: IntegerWeight, bias: Tensor | None):
        super().__init__(weight.sums, weight.step, weight.left, bias)
        self.register_buffer("weight", weight.rows)  # (O + r, I) int8

    def product(self, digits: Tensor) -> Tensor:
        return F.linear(digits.float(), self.weight.float())


class ExpandedWeightOnly(nn.Module):
    """A linear with int8 weights and a bfloat16 input (N, I).

    The weight is converted in every call, which is exact.
    """

    def __init__(self, weight: IntegerWeight, bias: Tensor | None):
        super().__init__()
        register_buffers(
            self,
            weight=weight.rows,       # (O + r, I) int8
            step=weight.step,         # (O,) float32
            left=weight.left,         # (O, r) float32
            bias=float32_copy(bias),  # (O,) float32, or None for zeros
        )

    def forward(self, x: Tensor) -> Tensor:
        products = F.linear(x, self.weight.to(x.dtype))  # (N, O + r)
        main, low = split_branch(products, self.left)
        return rescale(main, low, self.step, self.left, None, self.bias).to(x.dtype)
