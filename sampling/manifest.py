"""``manifest.json``: every setting that can change a pixel of a folder's images."""
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from errors import UserError
from files.atomic import atomic

NAME = "manifest.json"
Settings = dict[str, str | int | float | bool | None]


def fingerprint(settings: Settings) -> str:
    """16 hexadecimal digits that every image of the folder carries."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(stored: Settings, wanted: Settings) -> list[str]:
    """One phrase per setting that is not the same."""
    return [f"{key} is {stored.get(key)!r} there, {wanted.get(key)!r} now" for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key)]


def read(folder: Path) -> Settings:
    """Raises:
        UserError: the folder has no manifest, or a damaged one.
    """
    path = folder / NAME
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist: no images were made there yet") from None
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise UserError(f"'{path}' is damaged: give another --sample-dir, or --overwrite to start anew")
    return stored


def agree(folder: Path, settings: Settings) -> None:
    """Write the folder's manifest, or make sure that the one it has says the same.

    Raises:
        UserError: it does not; lists the differences.
    """
    path = folder / NAME
    if not path.exists():
        with atomic(folder / f"{NAME}.new", durable=True) as temporary:
            temporary.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
            with suppress(FileExistsError):
                os.link(temporary, path)  # unlike a rename, fails if another shard was faster
        (folder / f"{NAME}.new").unlink(missing_ok=True)
    if found := differences(read(folder), settings):
        raise UserError(f"'{folder}' holds images made with other settings ({'; '.join(found)}): give the same, another --sample-dir, "
                        "or --overwrite to start anew")
