"""The stages of a command: how long each takes, and that none leaves garbage to the next."""
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cli.memory import return_freed_memory


class Stopwatch:
    """Seconds of wall clock; ``seconds`` stays None until the stage ends."""

    seconds: float | None = None


@contextmanager
def stage(name: str, quiet: bool = False) -> Iterator[Stopwatch]:
    """Time a stage, and print how long it took when it ends; nothing is printed if it fails.

    Before it begins, what was freed goes back to the system (see ``return_freed_memory``).

    Args:
        quiet: print nothing (of several processes one speaks).
    """
    return_freed_memory()
    watch = Stopwatch()
    began = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - began
    if not quiet:
        print(f"{name}: {watch.seconds:.1f} s", flush=True)
