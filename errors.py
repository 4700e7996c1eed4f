"""A mistake of the person at the terminal, told in one line."""


class UserError(Exception):
    """A mistake of the person at the terminal: one line saying what was given, what was expected and what to do.

    ``every_rank``: other processes of the run do not find the same one.
    """

    every_rank = False
