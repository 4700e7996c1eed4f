"""CPU threads: how many there are, and how they wait for each other.

Imports nothing that loads OpenMP, so that scripts can import it first.

A thread of GNU's OpenMP, which torch brings along on Linux, looks for work 300,000 times before it
sleeps, which takes milliseconds. Beside another process the thread that is waited for may not run
meanwhile, and both processes crawl. On an idle machine looking is right: there a core that slept
takes longest to wake up. So a process looks around when it starts, and waits gently if the cores
are busy, or if another script of ours runs already. The second catches scripts that start together
on an idle machine: one of them is the first.

Milliseconds of a forward pass (DiT-S/2 W4A8, batch 2, bfloat16, int8 products, compiled blocks),
two threads on the two idle cores of an AMD EPYC, medians over 5 to 10 s:

    GOMP_SPINCOUNT          300000 (default)   20000      10000      5000       2000
    alone                   51 / 53            47 / 58    55 / 57    204 / 196  137 / 147
    two at once             304, 304           -          312, 307   202, 205   140, 143

One process with the default beside one with 2000: 52 and 138. KMP_BLOCKTIME is for another OpenMP,
and OMP_WAIT_POLICY=passive takes three times as long alone.
"""
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows has no such locks, and no GNU OpenMP.
    fcntl = None

# How often a thread looks for work before it sleeps, where other processes keep cores busy.
GENTLE_SPIN_COUNT = "2000"

# Cores that others keep busy, from which on a process waits gently.
BUSY_CORES = 0.5

# Seconds for which a process looks around.
LOOK_SECONDS = 0.1

# Environment variable that tells children: their parent found nobody else.
FIRST = "DITAS_FIRST"


def wait_gently() -> None:
    """Let threads that wait for work sleep soon, if others compute on this machine.

    Call it before torch is imported. What the user set stays. Children inherit the decision: they
    work while their parent waits.
    """
    if any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", FIRST)):
        return
    if claim_machine() and busy_cores() < BUSY_CORES:
        os.environ[FIRST] = "1"
    else:
        os.environ["GOMP_SPINCOUNT"] = GENTLE_SPIN_COUNT


def claim_machine() -> bool:
    """Take this user's lock on the machine until the process ends.

    Returns:
        Whether no other script of this user holds it. torchrun's processes share the cores among
        them and are no strangers to each other: it is true of all of them. It is true, too, where
        no lock can be had.
    """
    if fcntl is None:
        return True
    # Where no lock can be had, nothing is known about others.
    with suppress(OSError):
        path = Path(tempfile.gettempdir()) / f"ditas-{os.getuid()}.lock"
        # Stays open, so that the lock is held until the process ends.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "TORCHELASTIC_RUN_ID" in os.environ
    return True


def busy_cores() -> float:
    """Look how many cores are busy while this process sleeps; 0 where the system does not say."""
    before = _busy_seconds()
    if before is None:
        return 0.0
    time.sleep(LOOK_SECONDS)
    return (_busy_seconds() - before) / LOOK_SECONDS


def _busy_seconds() -> float | None:
    """Add up the seconds that all cores have worked since the system started."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    # After the word "cpu": user, nice, system.
    ticks = sum(map(int, first[1:4]))
    return ticks / os.sysconf("SC_CLK_TCK")


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
