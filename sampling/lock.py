"""One live run per folder, or one per shard of it; a dying holder's lock is released."""
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from errors import UserError

NAME = ".lock"


@contextmanager
def _held(path: Path, how: int) -> Iterator[None]:
    """Hold one lock file: ``fcntl.LOCK_EX`` alone, ``LOCK_SH`` beside others that share it."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(f"another run is writing to '{path.parent}' (process {holder}): "
                            "wait for it, or give another --sample-dir") from None
        if how == fcntl.LOCK_SH:
            yield
            return
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def locked(folder: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Hold the folder, or shard ``k`` of ``K``.

    Shards run beside each other, but not beside a run of the whole folder. The kernel releases the
    lock when its holder dies.

    Raises:
        UserError: a live run holds it.
    """
    with ExitStack() as stack:
        try:
            whole = fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH
            stack.enter_context(_held(folder / NAME, whole))
            if shard is not None:
                _hold_shard(stack, folder, *shard)
        except OSError as error:
            raise UserError(f"cannot lock '{folder}': {error.strerror}; "
                            "give a --sample-dir on a file system with locks") from None
        yield


def _hold_shard(stack: ExitStack, folder: Path, number: int, count: int) -> None:
    """Hold shard ``number`` of ``count``, and the division into ``count`` shards with others."""
    division = f"{NAME}-of-{count}"
    stack.enter_context(_held(folder / division, fcntl.LOCK_SH))
    # Shards of other divisions overlap this one: no run may hold them.
    for other in folder.glob(f"{NAME}-of-*"):
        if other.name != division:
            with _held(other, fcntl.LOCK_EX):
                pass
    stack.enter_context(_held(folder / f"{NAME}-{number}-of-{count}", fcntl.LOCK_EX))
