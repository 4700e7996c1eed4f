"""A module that is changed completely or not at all."""
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged_on_failure(module: nn.Module) -> Iterator[None]:
    """Give a module back all that it was if the block raises.

    Nothing is copied: what the block puts in the place of a tensor's values is forgotten. So it
    has to give a tensor new values (``tensor.data = …``) before it changes them in place.
    """
    contents = [(part, _contents(part)) for part in module.modules()]
    values = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        yield
    except BaseException:
        for part, content in contents:
            vars(part).clear()
            vars(part).update(content)
        for tensor, data in values:
            tensor.data = data
        raise


def _contents(part: nn.Module) -> dict[str, Any]:
    """Copy the attributes of a module, and its lists of parameters, submodules and hooks."""
    return {name: value.copy() if type(value) in (dict, OrderedDict) else value
            for name, value in vars(part).items()}
