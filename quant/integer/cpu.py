"""Integer products on CPUs through PyTorch's own oneDNN operators.

These use VNNI and AMX where the processor has them. The products are custom operators, so that
torch.compile fuses what lies around them and leaves the packed weights alone.
"""
import torch
from torch import Tensor

from quant.integer.linear import IntegerLinear
from quant.integer.weight import IntegerWeight, Nibbles
from quant.layers.buffers import register_buffers
from quant.layers.weight_only import WeightOnly
from quant.numerics.spec import QuantSpec


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
    total = _qlinear(codes, packed, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    return total.item() == 2 * 255 * 127


def _qlinear(codes: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    """Multiply by a packed weight with oneDNN, whose scales and zero points do nothing here."""
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0,           # the input, its scale and zero point
        packed, ones, zeros,     # the weight, its scales and zero points
        None,                    # no bias
        1.0, 0, torch.float32,   # scale, zero point and type of the output
        "none", [], "")          # no activation function behind it


@torch.library.custom_op("ditas::product", mutates_args=())
def product(codes: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    """Multiply codes by a prepacked int8 weight of R rows.

    Args:
        codes: (M, I) uint8.
        packed: the weight, as oneDNN packs it.
        ones, zeros: (R,) float32 and int32.

    Returns:
        (M, R) float32, int32 sums rounded once.
    """
    return _qlinear(codes, packed, ones, zeros)


@product.register_fake
def _(codes, packed, ones, zeros):
    return codes.new_empty(codes.shape[0], ones.shape[0], dtype=torch.float32)


@torch.library.custom_op("ditas::product_of_nibbles", mutates_args=())
def product_of_nibbles(
        codes: Tensor, nibbles: Tensor, scale: Tensor, zero: Tensor, right: Tensor,
        ones: Tensor, zeros: Tensor) -> Tensor:
    """Multiply codes by a weight of 4-bit codes above int8 rows, expanded for this call.

    Args:
        codes: (M, I) uint8.
        nibbles, scale, zero: the weight, as in ``Nibbles``.
        right: (r, I) int8.
        ones, zeros: (O + r,) float32 and int32.

    Returns:
        (M, O + r) float32, int32 sums rounded once.
    """
    weight = torch.cat([Nibbles(nibbles, scale, zero).expand(), right])
    packed = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))
    return _qlinear(codes, packed, ones, zeros)


@product_of_nibbles.register_fake
def _(codes, nibbles, scale, zero, right, ones, zeros):
    return codes.new_empty(codes.shape[0], ones.shape[0], dtype=torch.float32)


def _packed_buffers(weight: IntegerWeight) -> dict[str, Tensor]:
    """Make the buffers that ``product`` takes."""
    rows = weight.rows
    return {
        "packed": torch.ops.onednn.qlinear_prepack(rows, None),
        "ones": torch.ones(len(rows)),
        "zeros": torch.zeros(len(rows), dtype=torch.int32),
    }


class OneDNNLinear(IntegerLinear):
    """A linear whose weight is expanded to int8 and packed for the processor once."""

    def __init__(
            self, weight: IntegerWeight, bias: Tensor | None, smooth: Tensor | None,
            act: QuantSpec):
        super().__init__(weight, bias, smooth, act)
        register_buffers(self, **_packed_buffers(weight))

    def product(self, codes: Tensor) -> Tensor:
        return product(codes, self.packed, self.ones, self.zeros)


class OneDNNNibbleLinear(IntegerLinear):
    """A linear whose weight stays at 4 bits and is expanded in every call.

    It takes half the memory and more time.
    """

    def __init__(
            self, weight: IntegerWeight, nibbles: Nibbles, bias: Tensor | None,
            smooth: Tensor | None, act: QuantSpec):
        super().__init__(weight, bias, smooth, act)
        count = len(weight.codes) + len(weight.right)
        register_buffers(
            self,
            nibbles=nibbles.codes,                        # (O, I/2) uint8
            scale=nibbles.scale,                          # (O, G, 1) int8
            zero=nibbles.zero,                            # (O, G, 1) int8
            right=weight.right,                           # (r, I) int8
            ones=torch.ones(count),                       # (O + r,)
            zeros=torch.zeros(count, dtype=torch.int32),  # (O + r,)
        )

    def product(self, codes: Tensor) -> Tensor:
        return product_of_nibbles(
            codes, self.nibbles, self.scale, self.zero, self.right, self.ones, self.zeros)


class OneDNNWeightOnly(WeightOnly):
    """A weight-only linear on int8, which is a quarter of the memory to read."""

    def __init__(self, weight: IntegerWeight, bias: Tensor | None):
        super().__init__(weight.sums, weight.step, weight.left, bias)
        register_buffers(self, **_packed_buffers(weight))

    def product(self, digits: Tensor) -> Tensor:
        return product(digits, self.packed, self.ones, self.zeros)
