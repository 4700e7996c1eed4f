"""How long the stages of a command take."""
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds of wall clock; ``seconds`` stays None until the stage ends."""

    seconds: float | None = None


@contextmanager
def stage(name: str, quiet: bool = False) -> Iterator[Stopwatch]:
    """Time a stage, and print how long it took when it ends; nothing is printed if it fails.

    Args:
        quiet: print nothing (of several processes one speaks).
    """
    watch = Stopwatch()
    began = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - began
    if not quiet:
        print(f"{name}: {watch.seconds:.1f} s", flush=True)
