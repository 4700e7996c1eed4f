"""Check single values of a command line."""
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from errors import Part, SettingError, UserError
from files.atomic import writable_folder

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)


def user_value(call: Callable[..., Value], *args) -> Value:
    """Return ``call(*args)``; a ``ValueError`` is taken for the user's mistake.

    Raises:
        UserError: ``call`` raised a ``ValueError``; has the same message.
    """
    try:
        return call(*args)
    except SettingError as error:
        raise UserError(*error.args) from None
    except ValueError as error:
        raise UserError(str(error)) from None


def one_of(value: Value, allowed: Iterable[Value], flag: Part) -> Value:
    """Return ``value`` if it is allowed.

    Raises:
        UserError: it is not; lists what is.
    """
    if value not in allowed:
        names = ", ".join(map(str, allowed))
        raise UserError(flag, f" {value} is not available: expected one of {names}")
    return value


def expression(text: str, flag: str) -> str:
    """Return ``text``, a regular expression.

    Raises:
        UserError: it is none.
    """
    try:
        re.compile(text)
    except (re.error, TypeError) as error:
        raise UserError(f"{flag} '{text}' is no regular expression: {error}") from None
    return text


def at_least(value: Number, minimum: float, flag: Part) -> Number:
    """Return ``value`` if it is not below ``minimum``.

    Raises:
        UserError: it is below, or not a number.
    """
    if not value >= minimum:
        raise UserError(flag, f" {value} is too small: expected at least {minimum}")
    return value


def new_folder(folder: Path) -> Path:
    """Return ``folder``, which can be written, and is not there or is empty.

    Raises:
        UserError: it is there, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' is there already: give another --output")
    writable_folder(folder.parent)
    return folder


def class_labels(text: str, num_classes: int) -> list[int]:
    """Read a comma-separated list of classes.

    Raises:
        UserError: not numbers, or out of range.
    """
    parts = text.split(",")
    for part in parts:
        if not part.strip().isdecimal() or int(part) >= num_classes:
            raise UserError(f"bad class labels '{text}': expected numbers from 0 to "
                            f"{num_classes - 1}, separated by commas")
    return [int(part) for part in parts]
