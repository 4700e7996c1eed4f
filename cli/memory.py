"""Keep freed memory with the process, or give it back."""
import ctypes
import gc
import sys

# Parameters of mallopt(3).
MMAP_MAX = -4
TRIM_THRESHOLD = -1

KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Make glibc hand freed memory to the next tensor instead of to the system.

    Otherwise glibc returns large blocks to the kernel, which zeroes them again: a third of the
    time of sampling a small model on a CPU, a fifth of a larger one's. Does nothing with another
    C library.
    """
    mallopt = _libc_function("mallopt")
    if mallopt is not None:
        # The threshold for mmap cannot be set above 32 MiB, which tensors of large batches exceed.
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Give what was freed back to the system, before a stage whose tensors have other sizes.

    They would not fit into the gaps: for DiT-XL/2 each such stage added half a gigabyte. Does
    nothing but collect garbage with another C library than glibc.
    """
    # Hooks and closures hold tensors in cycles, which else may live for minutes.
    gc.collect()
    trim = _libc_function("malloc_trim")
    if trim is not None:
        trim(0)


def _libc_function(name: str):
    """Find a function of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
