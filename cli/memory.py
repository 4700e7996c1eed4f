"""Keep freed memory with the process, or give it back."""
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3).
TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
MMAP_MAX = -4

KEPT_BYTES = 1 << 30
OWN_BYTES = 1 << 20   # a block of so many lies in a mapping of its own
MAPPINGS = 1 << 16    # how many there may be, glibc's default


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


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Let every large block that is made inside go back to the system when it is freed.

    Loading a model makes and frees blocks of many sizes. Those that stay lie between gaps that the
    next ones do not fit: loading a DiT-XL/2 took 6.6 GB for 2.8 GB of tensors, and takes 4.3.
    Afterwards freed memory is kept as ``keep_freed_memory`` says. Does nothing with another C
    library than glibc.
    """
    mallopt = _libc_function("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(MMAP_THRESHOLD, OWN_BYTES)
    mallopt(MMAP_MAX, MAPPINGS)
    try:
        yield
    finally:
        keep_freed_memory()


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
