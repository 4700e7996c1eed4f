"""Integer products on CPUs through PyTorch's own oneDNN operators (VNNI and AMX where the processor has them).

The products are custom operators, so that torch.compile fuses what lies around them and leaves the packed weights alone.
"""
import torch
from torch import Tensor, nn

from quant.integer.linear import IntegerLinear
from quant.integer.weight import IntegerWeight, Nibbles
from quant.layers.weight_only import WeightOnly
from quant.numerics.uniform import QuantSpec


def supported() -> bool:
    """Tell whether oneDNN multiplies int8 exactly, and faster than float32, on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()) and _exact()


def _exact() -> bool:
    """Tell whether the largest sum of two products is right.

    Without VNNI it saturates at 16 bits. ``ONEDNN_MAX_CPU_ISA`` can forbid what the processor has.
    """
    codes = torch.full((1, 2), 255, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.full((1, 2), 127, dtype=torch.int8), None)
    total = _product(codes, packed, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    return total.item() == 2 * 255 * 127


def _product(codes: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")


@torch.library.custom_op("ditas::product", mutates_args=())
def product(codes: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    """``codes`` (M, I) uint8 times a prepacked int8 weight of R rows: (M, R) float32, int32 sums rounded once."""
    return _product(codes, packed, ones, zeros)


@torch.library.custom_op("ditas::product_of_nibbles", mutates_args=())
def product_of_nibbles(codes: Tensor, nibbles: Tensor, scale: Tensor, zero: Tensor, right: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    """The same with a weight of 4-bit codes (see ``Nibbles``), expanded for this call, above rows ``right`` (r, I) int8."""
    weight = torch.cat([Nibbles(nibbles, scale, zero).expand(), right])
    return _product(codes, torch.ops.onednn.qlinear_prepack(weight, list(codes.shape)), ones, zeros)


@product.register_fake
def _(codes, packed, ones, zeros):
    return codes.new_empty(codes.shape[0], ones.shape[0], dtype=torch.float32)


@product_of_nibbles.register_fake
def _(codes, nibbles, scale, zero, right, ones, zeros):
    return codes.new_empty(codes.shape[0], ones.shape[0], dtype=torch.float32)


def _register(module: nn.Module, weight: IntegerWeight) -> None:
    """Buffers of ``product``: the packed weight, and scales and zero points that do nothing."""
    rows = torch.cat([weight.codes, weight.right])
    module.register_buffer("packed", torch.ops.onednn.qlinear_prepack(rows, None))
    module.register_buffer("ones", torch.ones(len(rows)))
    module.register_buffer("zeros", torch.zeros(len(rows), dtype=torch.int32))


class OneDNNLinear(IntegerLinear):
    """Weights expanded to int8 and packed for the processor once."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None, smooth: Tensor | None, act: QuantSpec):
        super().__init__(weight, bias, smooth, act)
        _register(self, weight)

    def product(self, codes: Tensor) -> Tensor:
        return product(codes, self.packed, self.ones, self.zeros)


class OneDNNNibbleLinear(IntegerLinear):
    """Weights kept at 4 bits and expanded in every call: half the memory, more time."""

    def __init__(self, weight: IntegerWeight, nibbles: Nibbles, bias: Tensor | None, smooth: Tensor | None, act: QuantSpec):
        super().__init__(weight, bias, smooth, act)
        count = len(weight.codes) + len(weight.right)
        for name, value in {"nibbles": nibbles.codes, "scale": nibbles.scale, "zero": nibbles.zero, "right": weight.right,
                            "ones": torch.ones(count), "zeros": torch.zeros(count, dtype=torch.int32)}.items():
            self.register_buffer(name, value)

    def product(self, codes: Tensor) -> Tensor:
        return product_of_nibbles(codes, self.nibbles, self.scale, self.zero, self.right, self.ones, self.zeros)


class OneDNNWeightOnly(WeightOnly):
    """On int8: a quarter of the memory to read."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None):
        super().__init__(weight.sums, weight.step, weight.left, bias)
        _register(self, weight)

    def product(self, digits: Tensor) -> Tensor:
        return product(digits, self.packed, self.ones, self.zeros)
