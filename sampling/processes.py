"""The processes of a run: who they are, where they compute, and how the run ends."""
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from sampling.ranks import Ranks, Stopped, join
from sampling.stop import STATUS, StopFlag, die_with_launcher


@dataclass(frozen=True)
class Processes:
    """One process of a run, and its view of the others."""

    ranks: Ranks
    device: torch.device
    stopped: StopFlag

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.ranks.index == 0


def start_processes(threads: int, tf32: bool, launcher: int) -> Processes:
    """Join the other processes of a torchrun launch, and set what this one computes with.

    Args:
        threads: CPU threads. Products on a CPU change bits with their number.
        tf32: allow TF32 products.
        launcher: the process id of this one's parent when it started.
    """
    stopped = StopFlag()
    cuda = torch.cuda.is_available()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_launcher(launcher)
        join(cuda)
    state = PartialState(cpu=not cuda)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    ranks = Ranks(state.process_index, state.num_processes, stopped)
    return Processes(ranks, state.device, stopped)


@contextmanager
def reported_endings(run: Processes, folder: Path) -> Iterator[None]:
    """Turn a SIGTERM into a line on stderr, with the command to go on with, and status 143.

    After the run SIGTERM does again what it did before. A run that ends well closes the process
    group.
    """
    try:
        yield
    except Stopped:
        if run.is_first:
            print(f"stopped by SIGTERM; the same command continues in {folder}", file=sys.stderr)
        sys.exit(STATUS)
    finally:
        run.stopped.release()
    PartialState().destroy_process_group()


@contextmanager
def reported_full_disk(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a line on stderr and status 1."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        print(f"sample_merge_TAS.py: error: cannot write to '{folder}': {reason}; make room, then "
              "run the same command again", file=sys.stderr)
        sys.exit(1)
