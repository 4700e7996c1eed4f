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
    """Digest the settings: 16 hexadecimal digits that every image of the folder carries."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(stored: Settings, wanted: Settings) -> list[str]:
    """Describe every setting that is not the same in a phrase."""
    return [
        f"{key} is {stored.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted(stored.keys() | wanted.keys())
        if stored.get(key) != wanted.get(key)
    ]


def read(folder: Path) -> Settings:
    """Read the folder's manifest.

    Raises:
        UserError: the folder has none, or a damaged one.
    """
    path = folder / NAME
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist: no images were made there yet") from None
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise UserError(f"'{path}' is damaged: "
                        "give another --sample-dir, or --overwrite to start anew")
    return stored


def agree(folder: Path, settings: Settings) -> None:
    """Write the folder's manifest, or make sure that the one it has says the same.

    Raises:
        UserError: it does not; lists the differences.
    """
    if not (folder / NAME).exists():
        _write(folder, settings)
    changes = differences(read(folder), settings)
    if changes:
        raise UserError(f"'{folder}' holds images made with other settings ({'; '.join(changes)}): "
                        "give the same, another --sample-dir, or --overwrite to start anew")


def _write(folder: Path, settings: Settings) -> None:
    """Write the manifest, unless another shard is faster."""
    draft = folder / f"{NAME}.new"
    with atomic(draft, durable=True) as temporary:
        temporary.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
        with suppress(FileExistsError):
            # Unlike a rename, a link fails if the name is taken.
            os.link(temporary, folder / NAME)
    draft.unlink(missing_ok=True)
