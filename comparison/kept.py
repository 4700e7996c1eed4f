"""Steps whose results are kept, so that a comparison goes on where an earlier call stopped."""
import json
from pathlib import Path

from files.atomic import atomic


class KeptStep:
    """A step whose results stand beside a note of what they were made from.

    The note is a JSON object. Its entry ``key`` is everything that decides the results; when that
    changes, the step is done again.
    """

    def __init__(self, note: Path, key: list[str], results: list[Path]):
        self._note = note
        self._key = key
        self._results = results

    def load(self) -> dict | None:
        """Read the note; None if the step has to be done (again)."""
        note = read_note(self._note)
        if note is None or note.get("key") != self._key:
            return None
        return note if all(result.is_file() for result in self._results) else None

    def forget(self) -> None:
        """Remove the note: from now on the step is not done."""
        self._note.unlink(missing_ok=True)

    def keep(self, **values) -> None:
        """Note that the step is done, and what came out."""
        with atomic(self._note) as temporary:
            temporary.write_text(json.dumps({**values, "key": self._key}, indent=1))


def read_note(path: Path) -> dict | None:
    """Read a note; None where there is none, or a damaged one."""
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def file_identity(path: str | Path) -> str:
    """Identify a file as far as a look at its size and time tells."""
    if not Path(path).exists():
        return str(path)
    status = Path(path).stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"
