"""One live run per folder, or one per shard of it; the kernel releases the lock when its holder dies."""
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
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"another run is writing to '{path.parent}' (process {file.read().strip() or 'unknown'}): "
                            "wait for it, or give another --sample-dir") from None
        if how == fcntl.LOCK_EX:
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)
        else:
            yield


@contextmanager
def locked(folder: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Hold the folder, or shard ``k`` of ``K``: shards run beside each other, but not beside a run of the whole folder.

    Raises:
        UserError: a live run holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_held(folder / NAME, fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH))
            if shard is not None:
                number, count = shard
                stack.enter_context(_held(folder / f"{NAME}-of-{count}", fcntl.LOCK_SH))
                for other in folder.glob(f"{NAME}-of-*"):  # other partitions overlap this one
                    if other.name != f"{NAME}-of-{count}":
                        with _held(other, fcntl.LOCK_EX):
                            pass
                stack.enter_context(_held(folder / f"{NAME}-{number}-of-{count}", fcntl.LOCK_EX))
        except OSError as error:
            raise UserError(f"cannot lock '{folder}': {error.strerror}; give a --sample-dir on a file system with locks") from None
        yield
