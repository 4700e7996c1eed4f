"""What a checkpoint stores, in both directions: every function that writes has one beside it that reads."""
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quant.activations.attention import Operands
from quant.activations.quantisers import Activation
from quant.activations.softmax import PowersOfRootTwo
from quant.checkpoint.header import Header
from quant.layers.quantised import QuantizedLayer
from quant.numerics.uniform import OFF_BITS, Quantized, QuantSpec, grouped
from quant.recipe import act_spec
from quant.weights.low_rank import LowRankWeight


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below ``2^bits`` as a bit stream, little end first: uint8, ``ceil(numel * bits / 8)`` bytes."""
    planes = (codes.reshape(-1, 1).cpu().numpy() >> np.arange(bits, dtype=np.uint8)) & 1  # (numel, bits)
    return torch.from_numpy(np.packbits(planes.astype(np.uint8), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of ``pack``: uint8 codes of the given shape.

    Raises:
        ValueError: the stream's length does not fit the shape.
    """
    count = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.numel() != -(-count * bits // 8):
        raise ValueError(f"expected {-(-count * bits // 8)} bytes for {count} codes of {bits} bits, got {packed.numel()} of {packed.dtype}")
    planes = np.unpackbits(packed.numpy(), bitorder="little", count=count * bits).reshape(count, bits)
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little").reshape(shape))


def _layer_tensors(name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    weight, left, right = layer.weight.base, layer.weight.left, layer.weight.right
    low, high = weight.zero.aminmax()
    tensors = {"codes": pack(weight.codes, weight.spec.bits), "scale": weight.scale,
               "zero": pack(weight.zero.to(torch.uint8), weight.spec.bits) if low >= 0 and high <= weight.spec.top else weight.zero.to(torch.int32)}
    if weight.step is not None:
        tensors |= {"scale": weight.scale.to(torch.uint8), "step": weight.step.bfloat16()}
    if len(right):
        whole = torch.equal(right, right.round())  # what LowRankWeight.integer_branch made
        tensors |= {"left": left.bfloat16(), "right": right.to(torch.int8)} if whole else {"left": left, "right": right}
    if layer.act is not None and layer.act.static:
        tensors["act"] = torch.stack([layer.act.scale, layer.act.zero])
    tensors |= {key: value for key in ("smooth", "shift") if (value := getattr(layer, key)) is not None}
    return {f"{name}.{key}": value for key, value in tensors.items()}


def _half(value: Tensor) -> Tensor:
    """Float16 unless a value overflows."""
    return half if torch.isfinite(half := value.half()).all() else value


def _taker(tensors: dict[str, Tensor], name: str) -> Callable[[str, tuple[int, ...]], Tensor]:
    def take(key: str, expected: tuple[int, ...]) -> Tensor:
        value = tensors.pop(f"{name}.{key}")
        if tuple(value.shape) != expected:
            raise ValueError(f"{name}.{key} is {tuple(value.shape)}, expected {expected}")
        return value.float()
    return take


def _read_layer(tensors: dict[str, Tensor], name: str, shape: torch.Size, spec: QuantSpec, act: Activation | None) -> QuantizedLayer:
    take = _taker(tensors, name)
    rows, columns = shape
    view, dims = grouped(torch.empty(shape, device="meta"), spec)
    per_group = tuple(view.amin(dims, keepdim=True).shape)
    codes = unpack(tensors.pop(f"{name}.codes"), spec.bits, (rows, columns))
    if tensors[f"{name}.zero"].dim() == 1:
        zero = unpack(tensors.pop(f"{name}.zero"), spec.bits, per_group).float()
    else:
        zero = take("zero", per_group)
    step = take("step", (rows, 1)) if spec.convention == "two-level" else None
    weight = Quantized(codes, take("scale", per_group), zero, spec, step)
    rank = len(tensors.get(f"{name}.right", ()))
    left = take("left", (rows, rank)) if f"{name}.left" in tensors else torch.zeros(rows, 0)
    right = take("right", (rank, columns)) if f"{name}.right" in tensors else torch.zeros(0, columns)
    smooth, shift = (take(key, (columns,)) if f"{name}.{key}" in tensors else None for key in ("smooth", "shift"))
    if f"{name}.act" in tensors:
        each_step = tensors["timesteps"] if tensors[f"{name}.act"].dim() == 2 else None
        act = replace(act, **_range(take("act", (2,) if each_step is None else (2, len(each_step)))), timesteps=each_step)
    return QuantizedLayer(LowRankWeight(weight, left, right), act, smooth, shift=shift)


def _range(pair: Tensor) -> dict[str, Tensor]:
    return {"scale": pair[0], "zero": pair[1]}


def _read_operands(tensors: dict[str, Tensor], layers: dict[str, QuantizedLayer], depth: int, header: Header) -> dict[str, Operands]:
    recipe, spec = header.recipe, act_spec(header.recipe, header.act_bit)
    if recipe.attention == "none" or spec.bits == OFF_BITS:
        return {}
    powers, found = recipe.attention == "log-sqrt2", {}
    count = 3 if powers and header.format_version < 4 else 4
    for name in (f"blocks.{i}.attn" for i in range(depth)):
        acts = [Activation(spec, **_range(pair)) for pair in _taker(tensors, name)("operands", (count, 2))]
        probabilities = PowersOfRootTwo(spec.bits, acts[3].scale if count == 4 else torch.tensor(1.0)) if powers else acts[3]
        found[name] = Operands(*acts[:3], probabilities, layers[f"{name}.proj"].smooth)
    return found
