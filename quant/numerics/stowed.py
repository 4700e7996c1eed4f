"""Codes at their width: as a file holds them, and a tensor that waits until it is needed."""
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
    """A quantised tensor as a file holds it: small, on the CPU, and unpacked when it is read.

    Attributes:
        packed: the codes, as ``pack`` gives them.
        shape: of the codes.
        stored_scale: of the shape of ``scale``, float32; two-level ones uint8.
        stored_zero: as ``pack_zero`` gives it.
        spec: as in ``Coded``.
        stored_step: (O, 1) bfloat16 with two-level scales, else None.
        device: where what is read lies.

    Raises:
        ValueError: a stream's length does not fit its shape.
    """

    packed: Tensor
    shape: tuple[int, ...]
    stored_scale: Tensor
    stored_zero: Tensor
    spec: QuantSpec
    stored_step: Tensor | None = None
    device: torch.device = torch.device("cpu")

    def __post_init__(self):
        check_stream(self.packed, self.spec.bits, self.shape)
        if is_stream(self.stored_zero):
            check_stream(self.stored_zero, self.spec.bits, self.stored_scale.shape)

    @property
    def codes(self) -> Tensor:
        """Unpack the codes, uint8."""
        return unpack(self.packed, self.spec.bits, self.shape).to(self.device)

    @property
    def scale(self) -> Tensor:
        """Return the scales, float32."""
        return self.stored_scale.to(self.device, torch.float32)

    @property
    def zero(self) -> Tensor:
        """Unpack the zero points, float32."""
        zero = self.stored_zero
        if is_stream(zero):
            zero = unpack(zero, self.spec.bits, self.stored_scale.shape)
        return zero.to(self.device, torch.float32)

    @property
    def step(self) -> Tensor | None:
        """Return the step of each output channel, float32."""
        return None if self.stored_step is None else self.stored_step.to(self.device, torch.float32)


def is_stream(zero: Tensor) -> bool:
    """Tell whether zero points are a bit stream; elsewhere they have the shape of the scales."""
    return zero.dim() == 1


def pack_zero(zero: Tensor, spec: QuantSpec) -> Tensor:
    """Write zero points: those that are codes as a bit stream, others as int32 in their shape.

    Those of nearly equal values far off zero are beyond int32, and stay float32.
    """
    low, high = zero.aminmax()
    if low >= 0 and high <= spec.top:
        return pack(zero.to(torch.uint8), spec.bits)
    whole = zero.to("cpu", torch.int32)
    return whole if torch.equal(whole.float(), zero.cpu()) else zero.cpu()


def stow(quantized: Coded) -> Stowed:
    """Pack a tensor as a file holds it."""
    if isinstance(quantized, Stowed):
        return quantized
    scale, step = quantized.scale.cpu(), quantized.step
    return Stowed(
        packed=pack(quantized.codes, quantized.spec.bits),
        shape=tuple(quantized.codes.shape),
        stored_scale=scale if step is None else scale.to(torch.uint8),
        stored_zero=pack_zero(quantized.zero, quantized.spec),
        spec=quantized.spec,
        stored_step=None if step is None else step.to("cpu", torch.bfloat16),
        device=quantized.scale.device)
