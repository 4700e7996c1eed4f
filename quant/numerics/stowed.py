"""Codes at their width: as a file holds them, and a weight that waits until it is needed."""
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quant.numerics.spec import QuantSpec
from quant.numerics.uniform import Coded

BYTE = 8
# Eight codes of a byte each, or of fewer bits side by side, are moved as one number.
WORD = np.dtype("<u8")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write codes below ``2^bits`` as a bit stream, little end first.

    Returns:
        uint8, ``ceil(numel * bits / 8)`` bytes.
    """
    count = codes.numel()
    in_bytes = np.zeros(-(-count // BYTE) * BYTE, np.uint8)
    in_bytes[:count] = codes.reshape(-1).cpu().numpy()
    words = in_bytes.view(WORD)
    for half in (1, 2, 4):
        low, high, gap = _halves(half, bits)
        words = (words & low) | (words >> gap & high)
    stream = words.view(np.uint8).reshape(-1, BYTE)[:, :bits].reshape(-1)
    return torch.from_numpy(stream[:-(-count * bits // BYTE)].copy())


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Read what ``pack`` wrote: uint8 codes of the given shape.

    Raises:
        ValueError: the stream's length does not fit the shape.
    """
    check_stream(packed, bits, shape)
    count = math.prod(shape)
    groups = -(-count // BYTE)
    stream = np.zeros(groups * bits + WORD.itemsize, np.uint8)
    stream[:len(packed)] = packed.numpy()
    # A word from every place where eight codes begin; what lies above these is masked away.
    words = np.ndarray((groups,), WORD, stream, strides=(bits,)).copy()
    for half in (4, 2, 1):
        low, high, gap = _halves(half, bits)
        moved = words & high
        moved <<= gap
        words &= low
        words |= moved
    return torch.from_numpy(words.view(np.uint8)[:count].reshape(shape))


def check_stream(packed: Tensor, bits: int, shape: tuple[int, ...]) -> None:
    """Make sure that a bit stream is as long as its codes.

    Raises:
        ValueError: it is not.
    """
    count = math.prod(shape)
    wanted = -(-count * bits // BYTE)
    if packed.dtype != torch.uint8 or packed.numel() != wanted:
        raise ValueError(f"expected {wanted} bytes for {count} codes of {bits} bits, "
                         f"got {packed.numel()} of {packed.dtype}")


def _halves(half: int, bits: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Tell the bits of the lower and of the upper ``half`` codes among twice as many.

    Returns:
        Masks of the lower and the upper ones in a word of eight codes, in which each half lies at
        its final place and its codes side by side; and how far the upper ones are from there.
    """
    side_by_side = (1 << half * bits) - 1
    starts = range(0, 8 * BYTE, 2 * half * BYTE)
    low = sum(side_by_side << start for start in starts)
    return np.uint64(low), np.uint64(low << half * bits), np.uint64(half * (BYTE - bits))


@dataclass(frozen=True)
class Stowed(Coded):
    """A quantised tensor whose codes lie on the CPU at their width, and are unpacked when read.

    Attributes:
        packed: as ``pack`` gives them.
        shape: of the codes.
        scale, zero, spec, step: as in ``Coded``.

    Raises:
        ValueError: the stream's length does not fit the shape.
    """

    packed: Tensor
    shape: tuple[int, ...]
    scale: Tensor
    zero: Tensor
    spec: QuantSpec
    step: Tensor | None = None

    def __post_init__(self):
        check_stream(self.packed, self.spec.bits, self.shape)

    @property
    def codes(self) -> Tensor:
        """Unpack the codes, uint8."""
        return unpack(self.packed, self.spec.bits, self.shape).to(self.scale.device)


def stow(quantized: Coded) -> Coded:
    """Pack the codes of a tensor, if they are of fewer than 8 bits."""
    if quantized.spec.bits >= BYTE:
        return quantized
    packed = pack(quantized.codes, quantized.spec.bits)
    return Stowed(packed, quantized.codes.shape, quantized.scale, quantized.zero,
                  quantized.spec, quantized.step)
