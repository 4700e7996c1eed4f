"""CPU threads: how many there are, and how they wait for each other.

Imports nothing that loads OpenMP, so that scripts can import it first.

A thread of GNU's OpenMP, which torch brings along on Linux, looks for work many times before it
sleeps. By default it looks 300,000 times, which takes milliseconds. Beside another process, the
thread that is waited for may not run meanwhile. Sleeping at once is no better: waking up takes
longer than most steps of a small model.

Seconds of calibrating the bundled model with ``ditas`` (10 steps, 16 images, two threads) on two
cores that others used too. Alone: medians of five, interleaved. Beside the same: the slower of
two, medians of two.

    GOMP_SPINCOUNT        default    20000     5000     2000     1000
    alone                     1.9      1.9      1.9      2.1      2.4
    two at once               >25      >25       17      9.5      5.7

One thread takes 2.2 s alone. OMP_WAIT_POLICY=passive was measured to take 5.9 s alone, and 3.6 s
twice at once. KMP_BLOCKTIME is for another OpenMP.
"""
import os
from pathlib import Path

# How often a thread of GNU's OpenMP looks for work before it sleeps.
SPIN_COUNT = "2000"


def wait_gently() -> None:
    """Let threads that wait for work sleep soon. Call it before torch is imported.

    What the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def default_threads() -> int:
    """Choose the threads of this process: OMP_NUM_THREADS, else its share of all cores."""
    chosen = user_threads()
    return cores_per_process() if chosen is None else chosen


def cores_per_process() -> int:
    """Share the cores that this process may run on among the processes of the machine."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def user_threads() -> int | None:
    """Read OMP_NUM_THREADS, if the user set it to a number of threads.

    torchrun sets it to 1 for several processes where the user did not, which says nothing.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not first.isdecimal() or int(first) < 1 or _set_by_torchrun(first):
        return None
    return int(first)


def _set_by_torchrun(threads: str) -> bool:
    if "TORCHELASTIC_RUN_ID" not in os.environ or threads != "1":
        return False
    given = _start_environment(os.getppid())
    if given is None:
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    return "OMP_NUM_THREADS" not in given


def _start_environment(process: int) -> set[str] | None:
    """List the variables that a process was started with; None where the system does not say."""
    try:
        content = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return None
    entries = content.split(b"\0")
    return {entry.split(b"=")[0].decode(errors="replace") for entry in entries if entry}
