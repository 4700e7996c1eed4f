"""What the processes of a run tell each other.

They use the process group's store, not collectives. Collectives time out after 10 to 30 minutes;
a rank may well be that much slower than another.
"""
import json
import os
import time
import uuid
from collections.abc import Callable

import torch
import torch.distributed as dist

POLL_SECONDS = 0.1


def join(cuda: bool) -> None:
    """Open the process group of a torchrun launch: NCCL for tensors on GPUs, gloo for the rest.

    The launcher's store outlives a restart, and with it the addresses of the processes that were
    killed: on a single machine every restart gets names of its own. (Launchers on several machines
    count restarts differently, so that the number is no common name there;
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each of their restarts a fresh store.)
    """
    store, rank, count = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        store = dist.PrefixStore(f"start-{start}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)


class Ranks:
    """Rank ``index`` of ``count`` processes.

    Args:
        stopped: says whether this process was asked to stop; ends every wait with ``Stopped``.
    """

    def __init__(self, index: int, count: int, stopped: Callable[[], bool]):
        self.index = index
        self.count = count
        self._stopped = stopped
        self._store = dist.HashStore()
        if dist.is_initialized():
            # Every start has a name of its own: counters of a killed one may still be there.
            name = [uuid.uuid4().hex]
            dist.broadcast_object_list(name, src=0, device=torch.device("cpu"))
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore(name[0], store)

    def share(self, name: str, make: Callable[[], object]):
        """Give every rank what ``make()`` returns on rank 0; it must be JSON-able."""
        if self.index == 0:
            value = make()
            self._store.set(name, json.dumps(value))
            return value
        self.wait(lambda: self._store.check([name]))
        return json.loads(self._store.get(name))

    def add(self, name: str, amount: int) -> int:
        """Add to a counter that all ranks share; returns its value."""
        return self._store.add(name, amount)

    def read(self, name: str) -> int:
        """Return the value of a counter that all ranks share."""
        return self._store.add(name, 0)

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
