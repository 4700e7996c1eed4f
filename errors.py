"""A mistake of the person at the terminal, told in one line."""


class UserError(Exception):
    """Say in one line what was given, what was expected and what to do.

    Attributes:
        every_rank: other processes of the run do not find the same mistake, so each one says so.
    """

    every_rank = False
