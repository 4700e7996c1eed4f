"""What the processes of a run tell each other: through the process group's store, never through a collective.

Collectives time out after 10 to 30 minutes; a rank may well be that much slower than another.
"""
import json
import time
from collections.abc import Callable

import torch.distributed as dist

POLL_SECONDS = 0.1


class Ranks:
    """Rank ``index`` of ``count`` processes.

    Args:
        stopped: says whether this process was asked to stop; ends every wait with ``Stopped``.
    """

    def __init__(self, index: int, count: int, stopped: Callable[[], bool]):
        self.index, self.count, self._stopped = index, count, stopped
        self._store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()

    def share(self, name: str, make: Callable[[], object]):
        """Rank 0's ``make()``, JSON-able, on every rank."""
        if self.index == 0:
            value = make()
            self._store.set(name, json.dumps(value))
            return value
        self.wait(lambda: self._store.check([name]))
        return json.loads(self._store.get(name))

    def add(self, name: str, amount: int) -> int:
        """Add to a counter that all ranks share; returns its value."""
        return self._store.add(name, amount)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Return when ``ready()``, however long that takes.

        Raises:
            Stopped: this process was asked to stop.
        """
        while not ready():
            if self._stopped():
                raise Stopped
            time.sleep(POLL_SECONDS)


class Stopped(Exception):
    """This process was asked to stop."""
