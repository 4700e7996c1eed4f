"""The file that keeps what a search evaluated, so that it can go on."""
import json
import math
from pathlib import Path

from files.atomic import atomic
from quant.refinement.group_sizes import Sizes


def write_history(path: Path, settings: dict, stored: dict[Sizes, tuple[int, float]]) -> None:
    rows = [[number, loss, sizes] for sizes, (number, loss) in stored.items()]
    try:
        with atomic(path, durable=True) as temporary:
            temporary.write_text(json.dumps({**settings, "evaluated": rows}))
    except OSError as error:
        raise ValueError(f"cannot write '{path}': {error.strerror}; give another file") from None


def read_history(path: Path, settings: dict, options: tuple[Sizes, ...]) -> dict[Sizes, tuple[int, float]]:
    """Round and loss of every configuration in the file; a file that is not there is begun, to fail now rather than later."""
    if not path.exists():
        write_history(path, settings, {})
        return {}
    try:
        found = json.loads(path.read_text())
        rows = {tuple(sizes): (number, loss) for number, loss, sizes in found.pop("evaluated")}
        sound = found.keys() == settings.keys() and all(isinstance(number, int) and isinstance(loss, float) and math.isfinite(loss)
                                                        for number, loss in rows.values())
        changed = [key for key in settings if found[key] != settings[key]]
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}; give another file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound, changed = False, []
    if changed:
        phrases = ["other layers or group sizes" if key == "choices" else f"{key} is {found[key]!r} there, {settings[key]!r} now" for key in changed]
        raise ValueError(f"'{path}' holds a search with other settings ({'; '.join(phrases)}): give the same, another file, or delete it to "
                         "start anew")
    if not sound or any(len(sizes) != len(options) or not all(map(tuple.__contains__, options, sizes)) for sizes in rows):
        raise ValueError(f"'{path}' is damaged: give another file, or delete it to start the search anew")
    return rows
