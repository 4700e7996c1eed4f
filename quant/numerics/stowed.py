"""Codes at their width: as a file holds them, and a weight that waits until it is needed."""
import numpy as np
import torch
from torch import Tensor

from quant.numerics.uniform import Quantized

BYTE = 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write codes below ``2^bits`` as a bit stream, little end first.

    Returns:
        uint8, ``ceil(numel * bits / 8)`` bytes.
    """
    shifts = np.arange(bits, dtype=np.uint8)
    planes = (codes.reshape(-1, 1).cpu().numpy() >> shifts) & 1  # (numel, bits)
    return torch.from_numpy(np.packbits(planes.astype(np.uint8), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Read what ``pack`` wrote: uint8 codes of the given shape.

    Raises:
        ValueError: the stream's length does not fit the shape.
    """
    count = int(np.prod(shape))
    wanted = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.numel() != wanted:
        raise ValueError(f"expected {wanted} bytes for {count} codes of {bits} bits, "
                         f"got {packed.numel()} of {packed.dtype}")
    planes = np.unpackbits(packed.numpy(), bitorder="little", count=count * bits)
    codes = np.packbits(planes.reshape(count, bits), axis=1, bitorder="little")
    return torch.from_numpy(codes.reshape(shape))


class Stowed(Quantized):
    """A quantised tensor whose codes lie on the CPU at their width, and are unpacked when read.

    Attributes:
        packed: as ``pack`` gives them.
    """

    def __init__(self, quantized: Quantized):
        parts = {
            "packed": pack(quantized.codes, quantized.spec.bits),
            "scale": quantized.scale,
            "zero": quantized.zero,
            "spec": quantized.spec,
            "step": quantized.step,
            "_shape": tuple(quantized.codes.shape),
        }
        # It is frozen, as every quantised tensor.
        for name, value in parts.items():
            object.__setattr__(self, name, value)

    @property
    def codes(self) -> Tensor:
        """Unpack the codes, uint8."""
        return unpack(self.packed, self.spec.bits, self._shape).to(self.scale.device)


def stow(quantized: Quantized) -> Quantized:
    """Pack the codes of a tensor, if they are of fewer than 8 bits."""
    if quantized.spec.bits >= BYTE:
        return quantized
    return Stowed(quantized)
