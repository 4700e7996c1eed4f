"""Check single values of a command line."""
from collections.abc import Callable

from errors import UserError


def user_value(call: Callable, *args):
    """``call(*args)``, with its ``ValueError`` taken for the user's mistake."""
    try:
        return call(*args)
    except ValueError as error:
        raise UserError(str(error)) from None


def one_of(value, allowed, flag: str):
    """Raises:
        UserError: ``value`` is not allowed.
    """
    if value not in allowed:
        raise UserError(f"{flag} {value} is not available: expected one of {', '.join(map(str, allowed))}")
    return value


def at_least(value: float, minimum: float, flag: str):
    """Raises:
        UserError: ``value`` is below ``minimum``, or not a number.
    """
    if not value >= minimum:
        raise UserError(f"{flag} {value} is too small: expected at least {minimum}")
    return value


def class_labels(text: str, num_classes: int) -> list[int]:
    """A comma-separated list of classes.

    Raises:
        UserError: not numbers, or out of range.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < num_classes for part in parts):
        raise UserError(f"bad class labels '{text}': expected numbers from 0 to {num_classes - 1}, separated by commas")
    return [int(part) for part in parts]
