"""The file that keeps what a search evaluated, so that it can go on."""
import json
import math
from pathlib import Path

from files.atomic import atomic
from quant.refinement.group_sizes import Sizes

Evaluated = dict[Sizes, tuple[int, float]]  # configuration -> its round, counted from 1, and loss


class HistoryFile:
    """A JSON file of one search: its settings, and every evaluation so far.

    Args:
        path: read if it is there, else begun.
        settings: all that the evaluations depend on, as JSON can hold it. A file of others is
            refused.
        options: the group sizes of each layer, in the order of the layers.
    """

    def __init__(self, path: Path, settings: dict, options: tuple[Sizes, ...]):
        self._path = path
        self._settings = settings
        self._options = options

    def write(self, evaluated: Evaluated) -> None:
        """Replace the file, at once and durably.

        Raises:
            ValueError: it cannot be written.
        """
        rows = [[number, loss, sizes] for sizes, (number, loss) in evaluated.items()]
        content = json.dumps({**self._settings, "evaluated": rows})
        try:
            with atomic(self._path, durable=True) as temporary:
                temporary.write_text(content)
        except OSError as error:
            raise ValueError(
                f"cannot write '{self._path}': {error.strerror}; give another file"
            ) from None

    def read(self) -> Evaluated:
        """Read every evaluation; a file that is not there is begun, to fail now rather than later.

        Raises:
            ValueError: the file cannot be read or written, is damaged, or has other settings.
        """
        if not self._path.exists():
            self.write({})
            return {}

        # Parse it.
        try:
            content = json.loads(self._path.read_text())
            rows = content.pop("evaluated")
            evaluated = {tuple(sizes): (number, loss) for number, loss, sizes in rows}
            changed = [key for key, value in self._settings.items() if content[key] != value]
        except OSError as error:
            raise ValueError(
                f"cannot read '{self._path}': {error.strerror}; give another file"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damage() from None

        # Refuse one of another search, and what no search has written.
        if changed:
            differences = "; ".join(self._difference(key, content[key]) for key in changed)
            raise ValueError(
                f"'{self._path}' holds a search with other settings ({differences}): "
                "give the same, another file, or delete it to start anew"
            )
        if content.keys() != self._settings.keys():
            raise self._damage()
        if not all(self._is_sound(sizes, *entry) for sizes, entry in evaluated.items()):
            raise self._damage()
        return evaluated

    def _is_sound(self, sizes: Sizes, number: int, loss: float) -> bool:
        """Tell whether a row of the file can be one that ``write`` left there."""
        if len(sizes) != len(self._options):
            return False
        if not all(size in choices for size, choices in zip(sizes, self._options)):
            return False
        return isinstance(number, int) and isinstance(loss, float) and math.isfinite(loss)

    def _difference(self, key: str, stored: object) -> str:
        """Say how a setting in the file differs from this search's."""
        if key == "choices":
            return "other layers or group sizes"
        return f"{key} is {stored!r} there, {self._settings[key]!r} now"

    def _damage(self) -> ValueError:
        return ValueError(
            f"'{self._path}' is damaged: "
            "give another file, or delete it to start the search anew"
        )
