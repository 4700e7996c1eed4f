"""Files that appear whole or not at all, in folders that can be written."""
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError


def file_stem(text: str) -> str:
    """Replace everything in ``text`` that is awkward in a file's name."""
    return re.sub(r"[^\w.=-]", "-", text)


@contextmanager
def atomic(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it if the block succeeds, remove it if not.

    Args:
        durable: put the content on disk before the name, so that a power failure leaves no empty
            file.
    """
    # Several machines may write into one folder, so a process id alone is not unique.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; rename it if the block succeeds, else remove it.

    ``folder`` is empty or not there.
    """
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def writable_folder(folder: Path) -> Path:
    """Create ``folder`` if need be, check that files can be written there, and return it.

    Raises:
        UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to folder '{folder}': {error.strerror}; give another one"
        ) from None
    return folder
