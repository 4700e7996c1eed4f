"""A mistake of the person at the terminal, told in one line, and the settings that it names."""
from collections.abc import Callable, Iterable


class Setting:
    """A setting in a message; the command line and Python each spell it in their own way.

    Args:
        name: as a keyword of ``ditas.quantize``.
        values: that it may have; none: the text says it.
    """

    def __init__(self, name: str, *values: object):
        self.name = name
        self.values = values

    def __str__(self) -> str:
        return as_keyword(self)


# What a message consists of.
Part = str | Setting


def as_keyword(setting: Setting) -> str:
    """Spell a setting as Python does: ``act_range='static'``."""
    values = listed(map(repr, setting.values))
    return f"{setting.name}={values}" if values else setting.name


def as_flag(setting: Setting) -> str:
    """Spell a setting as the command line does: ``--act-range static``."""
    flag = f"--{setting.name.replace('_', '-')}"
    values = listed(map(str, setting.values))
    return f"{flag} {values}" if values else flag


def listed(words: Iterable[str]) -> str:
    """Write words as a choice: ``a, b or c``."""
    *others, last = [*words] or [""]
    return f"{', '.join(others)} or {last}" if others else last


class _Told(Exception):
    """A message in parts. Its text is Python's."""

    def __init__(self, *parts: Part):
        super().__init__(*parts)

    def __str__(self) -> str:
        return self.spelled(as_keyword)

    def spelled(self, spell: Callable[[Setting], str]) -> str:
        """Write the message, its settings as ``spell`` does."""
        return "".join(spell(part) if isinstance(part, Setting) else part for part in self.args)


class SettingError(_Told, ValueError):
    """Say which settings do not go together, or not with a model."""


class UserError(_Told):
    """Say in one line what was given, what was expected and what to do.

    Attributes:
        every_rank: other processes of the run do not find the same mistake, so each one says so.
    """

    every_rank = False
