"""What a checkpoint stores, in both directions: beside each function that writes stands its reader.

Names are relative to a quantised linear or an attention; ``store`` puts that name before them.
"""
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from quant.activations.attention import Operands
from quant.activations.quantisers import Activation
from quant.activations.softmax import PowersOfRootTwo
from quant.layers.quantised import QuantizedLayer
from quant.numerics.floating import FloatWeight, half_unless_overflow
from quant.numerics.smoothing import Smoothing
from quant.numerics.spec import OFF_BITS, QuantSpec
from quant.numerics.stowed import Stowed, pack, unpack
from quant.numerics.uniform import Coded, grouped
from quant.weights.low_rank import LowRankWeight

Tensors = dict[str, Tensor]

# What the model is called with at each step, where ranges depend on it: once for all of them.
TIMESTEPS = "timesteps"

# Before the names of factors and shift that were folded away.
FOLDED = "folded_"

# Takes a stored tensor away by its name, as float32; a ``ValueError`` if its shape is not this one.
Take = Callable[[str, tuple[int, ...]], Tensor]


def write_zero(zero: Tensor, spec: QuantSpec) -> Tensor:
    """Write zero points: those that are codes as a bit stream, others as int32 in their shape."""
    low, high = zero.aminmax()
    if low >= 0 and high <= spec.top:
        return pack(zero.to(torch.uint8), spec.bits)
    return zero.to(torch.int32)


def read_zero(tensors: Tensors, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """Read zero points, float32."""
    if tensors[f"{name}.zero"].dim() == 1:
        return unpack(tensors.pop(f"{name}.zero"), spec.bits, shape).float()
    return taker(tensors, name)("zero", shape)


def write_base(weight: Coded | FloatWeight) -> Tensors:
    """Write a quantised weight: codes, zero points and scales; at 16 bits ``weight`` alone.

    Scales are float32; two-level ones uint8, beside a bfloat16 step per output channel.
    """
    if isinstance(weight, FloatWeight):
        return {"weight": half_unless_overflow(weight.values)}
    is_packed = isinstance(weight, Stowed)
    tensors = {
        "codes": weight.packed if is_packed else pack(weight.codes, weight.spec.bits),
        "zero": write_zero(weight.zero, weight.spec),
        "scale": weight.scale,
    }
    if weight.step is not None:
        tensors["scale"] = weight.scale.to(torch.uint8)
        tensors["step"] = weight.step.bfloat16()
    return tensors


def read_base(
    tensors: Tensors, name: str, shape: tuple[int, int], spec: QuantSpec
) -> Coded | FloatWeight:
    """Read a quantised weight (O, I)."""
    take = taker(tensors, name)
    if spec.bits == OFF_BITS:
        return FloatWeight(take("weight", shape))
    view, dims = grouped(torch.empty(shape, device="meta"), spec)
    per_group = list(view.shape)
    for dim in dims:
        per_group[dim] = 1
    packed = tensors.pop(f"{name}.codes")
    zero = read_zero(tensors, name, spec, tuple(per_group))
    step = take("step", (shape[0], 1)) if spec.convention == "two-level" else None
    return Stowed(packed, shape, take("scale", tuple(per_group)), zero, spec, step)


def write_branch(weight: LowRankWeight) -> Tensors:
    """Write ``left`` and ``right``; nothing without a branch.

    They are bfloat16 and int8 where ``LowRankWeight.integer_branch`` made whole numbers of
    ``right``, and float32 in the published order.
    """
    if not len(weight.right):
        return {}
    if torch.equal(weight.right, weight.right.round()):
        return {"left": weight.left.bfloat16(), "right": weight.right.to(torch.int8)}
    return {"left": weight.left, "right": weight.right}


def read_branch(tensors: Tensors, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Read ``left`` (O, r) and ``right`` (r, I), float32; r is 0 without a branch."""
    rows, columns = shape
    take = taker(tensors, name)
    rank = len(tensors.get(f"{name}.right", ()))
    left, right = torch.zeros(rows, 0), torch.zeros(0, columns)
    if f"{name}.left" in tensors:
        left = take("left", (rows, rank))
    if f"{name}.right" in tensors:
        right = take("right", (rank, columns))
    return left, right


def write_smoothing(smoothing: Smoothing, prefix: str = "") -> Tensors:
    """Write ``smooth``, the factors, and ``shift``, float32, as far as there are any."""
    both = {f"{prefix}smooth": smoothing.factors, f"{prefix}shift": smoothing.shift}
    # The linears of a site share one tensor, which safetensors refuses to write twice.
    return {key: value.clone() for key, value in both.items() if value is not None}


def read_smoothing(tensors: Tensors, name: str, columns: int, prefix: str = "") -> Smoothing:
    """Read factors and shift, (I,) each."""
    take = taker(tensors, name)
    smooth, shift = f"{prefix}smooth", f"{prefix}shift"
    return Smoothing(
        take(smooth, (columns,)) if f"{name}.{smooth}" in tensors else None,
        take(shift, (columns,)) if f"{name}.{shift}" in tensors else None)


def write_offset(offset: Tensor | None) -> Tensors:
    """Write ``offset``, what is taken out of the output for a shift, float32, if it is given."""
    return {} if offset is None else {"offset": offset}


def read_offset(tensors: Tensors, name: str, rows: int) -> Tensor | None:
    """Read the offset (O,); None where the quantised weight decides it."""
    return taker(tensors, name)("offset", (rows,)) if f"{name}.offset" in tensors else None


def write_rows(rows: Tensor | None) -> Tensors:
    """Write ``rows``, the output scales of a layer into which factors were folded, if there are."""
    return {} if rows is None else {"rows": rows}


def read_rows(tensors: Tensors, name: str, rows: int) -> Tensor | None:
    """Read the output scales (O,); None for ones."""
    return taker(tensors, name)("rows", (rows,)) if f"{name}.rows" in tensors else None


def write_act(act: Activation | None) -> Tensors:
    """Write a static range, ``act``: scale above zero point, one each or one per timestep."""
    if act is None or not act.is_static:
        return {}
    return {"act": torch.stack([act.scale, act.zero])}


def read_act(tensors: Tensors, name: str, act: Activation | None) -> Activation | None:
    """Read the static range of a quantiser that is otherwise known; dynamic ones have none."""
    if f"{name}.act" not in tensors:
        return act
    timesteps = tensors[TIMESTEPS] if tensors[f"{name}.act"].dim() == 2 else None
    shape = (2,) if timesteps is None else (2, len(timesteps))
    scale, zero = taker(tensors, name)("act", shape)
    return replace(act, scale=scale, zero=zero, timesteps=timesteps)


def write_layer(name: str, layer: QuantizedLayer) -> Tensors:
    """Write a quantised linear."""
    tensors = {
        **write_base(layer.weight.base),
        **write_branch(layer.weight),
        **write_act(layer.act),
        **write_smoothing(layer.smoothing),
        **write_offset(layer.offset),
        **write_rows(layer.rows),
        **write_smoothing(layer.folded, FOLDED),
    }
    return {f"{name}.{key}": value for key, value in tensors.items()}


def read_layer(
    tensors: Tensors, name: str, shape: torch.Size, spec: QuantSpec, act: Activation | None
) -> QuantizedLayer:
    """Read a quantised linear of a weight (O, I), and take its tensors away.

    Raises:
        ValueError, KeyError: a tensor is missing or of another shape.
    """
    rows, columns = shape
    base = read_base(tensors, name, (rows, columns), spec)
    left, right = read_branch(tensors, name, (rows, columns))
    smoothing = read_smoothing(tensors, name, columns)
    act = read_act(tensors, name, act)
    offset = read_offset(tensors, name, rows)
    scales = read_rows(tensors, name, rows)
    folded = read_smoothing(tensors, name, columns, FOLDED)
    weight = LowRankWeight(base, left, right)
    return QuantizedLayer(weight, act, smoothing, scales, offset, folded)


def write_operands(operands: Operands) -> Tensor:
    """Write the quantisers of an attention's operands: scale and zero point, (4, 2) or (4, 2, S).

    The rows are query, key, value and probabilities; powers of the square root of 2 have a zero
    point of 0. There are S entries for as many timesteps, where ranges depend on it.
    """
    rows = [torch.stack([act.scale, act.zero])
            for act in (operands.query, operands.key, operands.value)]
    last = operands.probabilities
    if isinstance(last, PowersOfRootTwo):
        rows.append(torch.stack([last.scale, torch.zeros_like(last.scale)]))
    else:
        rows.append(torch.stack([last.scale, last.zero]))
    return torch.stack(rows)


def read_operands(
    tensors: Tensors, name: str, rows: int, spec: QuantSpec, has_powers: bool
) -> Operands:
    """Read the quantisers of an attention's operands, without factors.

    Args:
        rows: 4, or 3 in format 3, in which powers of the square root of 2 began at 1.
        has_powers: the probabilities are quantised so.
    """
    timesteps = tensors[TIMESTEPS] if tensors[f"{name}.operands"].dim() == 3 else None
    shape = (rows, 2) if timesteps is None else (rows, 2, len(timesteps))
    stored = taker(tensors, name)("operands", shape)
    query, key, value, *rest = (Activation(spec, *row, timesteps) for row in stored)
    if not has_powers:
        return Operands(query, key, value, rest[0])
    scale = rest[0].scale if rest else torch.tensor(1.0)
    return Operands(query, key, value, PowersOfRootTwo(spec.bits, scale))


def taker(tensors: Tensors, name: str) -> Take:
    """Make a function that takes the tensors of one layer away, after a look at their shapes."""

    def take(key: str, expected: tuple[int, ...]) -> Tensor:
        value = tensors.pop(f"{name}.{key}")
        if tuple(value.shape) != expected:
            raise ValueError(f"{name}.{key} is {tuple(value.shape)}, expected {expected}")
        return value.float()

    return take
