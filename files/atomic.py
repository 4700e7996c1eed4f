"""Files that appear whole or not at all, and their fingerprints."""
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError


def file_stem(text: str) -> str:
    """``text`` with everything replaced that is awkward in a file's name."""
    return re.sub(r"[^\w.=-]", "-", text)


@contextmanager
def atomic(path: Path, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` that is renamed to it if the block succeeds and removed if not.

    Args:
        durable: make sure that the content is on disk before the name is, so that a power failure leaves no empty file.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_folder(folder: Path) -> Path:
    """Create ``folder`` if need be and make sure that files can be written there.

    Raises:
        UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to folder '{folder}': {error.strerror}; give another one") from None
    return folder


