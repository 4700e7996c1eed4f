"""Keep freed memory with the process."""
import ctypes
import sys

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # parameters of mallopt(3)


def keep_freed_memory() -> None:
    """Make glibc hand freed memory to the next tensor instead of to the system; does nothing with another C library.

    Otherwise every tensor above 128 KiB may be fresh pages, which the kernel clears: a third of the time of sampling a small model on a CPU, a fifth of a larger one's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)  # the threshold for mmap cannot be set above 32 MiB, which the tensors of large batches exceed
        mallopt(TRIM_THRESHOLD, 1 << 30)
