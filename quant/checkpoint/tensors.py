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
from quant.numerics.stowed import Stowed, is_stream
from quant.numerics.uniform import grouped
from quant.weights.stowed import StowedWeight, stow_weight

Tensors = dict[str, Tensor]

# What the model is called with at each step, where ranges depend on it: once for all of them.
TIMESTEPS = "timesteps"

# Before the names of factors and shift that were folded away.
FOLDED = "folded_"

# Takes a stored tensor away by its name; a ``ValueError`` if its shape is not this one.
Take = Callable[[str, tuple[int, ...]], Tensor]


def write_base(weight: Stowed | FloatWeight) -> Tensors:
    """Write a quantised weight: codes, zero points and scales; at 16 bits ``weight`` alone."""
    if isinstance(weight, FloatWeight):
        return {"weight": half_unless_overflow(weight.values)}
    tensors = {
        "codes": weight.packed, "zero": weight.stored_zero, "scale": weight.stored_scale}
    step = weight.stored_step
    return tensors if step is None else tensors | {"step": step}


def read_base(
    tensors: Tensors, name: str, shape: tuple[int, int], spec: QuantSpec
) -> Stowed | FloatWeight:
    """Read a quantised weight (O, I)."""
    take = taker(tensors, name)
    if spec.bits == OFF_BITS:
        return FloatWeight(take("weight", shape).float())
    view, dims = grouped(torch.empty(shape, device="meta"), spec)
    per_group = list(view.shape)
    for dim in dims:
        per_group[dim] = 1
    packed, zero = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.zero")
    if not is_stream(zero):
        check_shape(f"{name}.zero", zero, tuple(per_group))
    step = take("step", (shape[0], 1)) if spec.convention == "two-level" else None
    return Stowed(packed, shape, take("scale", tuple(per_group)), zero, spec, step)


def write_branch(weight: StowedWeight) -> Tensors:
    """Write ``left`` and ``right``; nothing without a branch."""
    left, right = weight.stored_left, weight.stored_right
    return {"left": left, "right": right} if len(right) else {}


def read_branch(tensors: Tensors, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Read ``left`` (O, r) and ``right`` (r, I), as they are stored; r is 0 without a branch."""
    rows, columns = shape
    if f"{name}.right" not in tensors:
        return torch.zeros(rows, 0), torch.zeros(0, columns)
    take = taker(tensors, name)
    rank = len(tensors[f"{name}.right"])
    return take("left", (rows, rank)), take("right", (rank, columns))


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
        take(smooth, (columns,)).float() if f"{name}.{smooth}" in tensors else None,
        take(shift, (columns,)).float() if f"{name}.{shift}" in tensors else None)


def write_offset(offset: Tensor | None) -> Tensors:
    """Write ``offset``, what is taken out of the output for a shift, float32, if it is given."""
    return {} if offset is None else {"offset": offset}


def read_offset(tensors: Tensors, name: str, rows: int) -> Tensor | None:
    """Read the offset (O,); None where the quantised weight decides it."""
    return taker(tensors, name)("offset", (rows,)).float() if f"{name}.offset" in tensors else None


def write_rows(rows: Tensor | None) -> Tensors:
    """Write ``rows``, the output scales of a layer into which factors were folded, if there are."""
    return {} if rows is None else {"rows": rows}


def read_rows(tensors: Tensors, name: str, rows: int) -> Tensor | None:
    """Read the output scales (O,); None for ones."""
    return taker(tensors, name)("rows", (rows,)).float() if f"{name}.rows" in tensors else None


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
    scale, zero = taker(tensors, name)("act", shape).float()
    return replace(act, scale=scale, zero=zero, timesteps=timesteps)


def write_layer(name: str, layer: QuantizedLayer) -> Tensors:
    """Write a quantised linear."""
    weight = stow_weight(layer.weight)
    tensors = {
        **write_base(weight.base),
        **write_branch(weight),
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
    branch = read_branch(tensors, name, (rows, columns))
    smoothing = read_smoothing(tensors, name, columns)
    act = read_act(tensors, name, act)
    offset = read_offset(tensors, name, rows)
    scales = read_rows(tensors, name, rows)
    folded = read_smoothing(tensors, name, columns, FOLDED)
    return QuantizedLayer(StowedWeight(base, *branch), act, smoothing, scales, offset, folded)


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
    stored = taker(tensors, name)("operands", shape).float()
    query, key, value, *rest = (Activation(spec, *row, timesteps) for row in stored)
    if not has_powers:
        return Operands(query, key, value, rest[0])
    scale = rest[0].scale if rest else torch.tensor(1.0)
    return Operands(query, key, value, PowersOfRootTwo(spec.bits, scale))


def taker(tensors: Tensors, name: str) -> Take:
    """Make a function that takes the tensors of one layer away, after a look at their shapes."""

    def take(key: str, expected: tuple[int, ...]) -> Tensor:
        value = tensors.pop(f"{name}.{key}")
        check_shape(f"{name}.{key}", value, expected)
        return value

    return take


def check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    """Make sure that a stored tensor has the shape that its layer asks for.

    Raises:
        ValueError: it has not.
    """
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} is {tuple(value.shape)}, expected {expected}")
