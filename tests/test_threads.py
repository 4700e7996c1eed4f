"""How many CPU threads a script takes, and how they wait."""
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import QuantDiT
import sample_merge_TAS
from cli import threads
from cli.sample_settings import run_settings
from cli.settings import quantize_settings
from cli.threads import (
    FIRST,
    GENTLE_SPIN_COUNT,
    busy_cores,
    cores_per_process,
    default_threads,
    user_threads,
    wait_gently,
)

ROOT = Path(__file__).parents[1]
CORES = cores_per_process()


@pytest.fixture(autouse=True)
def _as_a_user_starts_it(monkeypatch):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("text, count", [
    ("3", 3), ("3,2", 3), (" 5 ", 5), ("1", 1),
    ("", None), ("many", None), ("0", None), ("-2", None),
])
def test_what_the_user_set_counts(monkeypatch, text, count):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert user_threads() == count
    assert default_threads() == (CORES if count is None else count)


def test_cores_are_shared_among_the_processes_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12), raising=False)
    assert default_threads() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert default_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "50")
    assert default_threads() == 1


@pytest.mark.parametrize("started_with, processes, counts", [
    ({"PATH"}, "2", False),
    ({"PATH", "OMP_NUM_THREADS"}, "2", True),
    (None, "2", False),  # the system does not say: several processes
    (None, "1", True),  # torchrun sets nothing for a single one
])
def test_the_one_that_torchrun_sets_does_not_count(
    monkeypatch, started_with, processes, counts,
):
    monkeypatch.setattr(threads, "_start_environment", lambda process: started_with)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert user_threads() == (1 if counts else None)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # never torchrun's
    assert user_threads() == 2


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the system does not say")
@pytest.mark.parametrize("given, expected", [(None, "None"), ("1", "1")])
def test_under_a_real_torchrun(tmp_path, given, expected):
    program = tmp_path / "program.py"
    program.write_text("from cli.threads import user_threads\n"
                       # One write: torchrun's processes are unbuffered and share a pipe.
                       "print(f'threads {user_threads()}\\n', end='', flush=True)\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if given is not None:
        environment["OMP_NUM_THREADS"] = given
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1",
               "--nproc_per_node=2", str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"threads (None|\d+)", done.stdout) == [expected, expected]


def test_both_scripts_take_the_flag_before_all_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for script, settings in ((QuantDiT, quantize_settings), (sample_merge_TAS, run_settings)):
        arguments = ["--model", "DiT-Digits"]
        parse = script.make_parser().parse_args
        assert settings(parse(arguments)).threads == 3
        assert settings(parse([*arguments, "--threads", "2"])).threads == 2


def display(script: str, **environment: str) -> str:
    """What OpenMP says of itself when it is loaded; a wrong name of a model is found after that."""
    if not list(Path(torch.__file__).parent.glob("lib/libgomp*")):
        pytest.skip("this torch brings no GNU OpenMP")
    ours = ("GOMP", "OMP", "DITAS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run(
        [sys.executable, ROOT / script, "--model", "DiT-Nope"], capture_output=True, text=True,
        env={**kept, "OMP_DISPLAY_ENV": "VERBOSE", **environment})
    assert done.returncode == 2 and "unknown model 'DiT-Nope'" in done.stderr
    assert "GOMP_SPINCOUNT" in done.stderr
    return done.stderr


@pytest.fixture
def busy_neighbour():
    """Keep a core busy with another process."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield
        process.kill()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say")
@pytest.mark.parametrize("script", ["QuantDiT.py", "sample_merge_TAS.py"])
def test_beside_a_busy_process_openmp_loads_with_a_short_spin(script, busy_neighbour):
    assert busy_cores() >= 0.5
    assert f"GOMP_SPINCOUNT = '{GENTLE_SPIN_COUNT}'" in display(script)


@pytest.mark.parametrize("first, busy, spin", [
    (True, 0.0, None),
    (True, 0.49, None),
    (True, 1.0, GENTLE_SPIN_COUNT),
    (False, 0.0, GENTLE_SPIN_COUNT),
])
def test_alone_threads_wait_as_the_library_has_it(monkeypatch, first, busy, spin):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", FIRST):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "claim_machine", lambda: first)
    monkeypatch.setattr(threads, "busy_cores", lambda: busy)
    wait_gently()
    assert os.environ.get("GOMP_SPINCOUNT") == spin

    # A child decides as its parent did, whatever it sees.
    monkeypatch.setattr(threads, "claim_machine", lambda: not first)
    monkeypatch.setattr(threads, "busy_cores", lambda: 2.0)
    wait_gently()
    assert os.environ.get("GOMP_SPINCOUNT") == spin


ASK_AND_STAY = """
from cli.threads import claim_machine
print(claim_machine(), flush=True)
input()
"""


@pytest.mark.skipif(threads.fcntl is None, reason="this system has no file locks")
def test_one_process_is_the_first_until_it_is_killed(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TORCHELASTIC_RUN_ID", None)

    @contextmanager
    def process(**more):
        command = [sys.executable, "-c", ASK_AND_STAY]
        with subprocess.Popen(command, env={**environment, **more}, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
            yield running.stdout.readline().strip()
            running.kill()

    with process() as one, process() as two, process(TORCHELASTIC_RUN_ID="none") as rank:
        assert (one, two, rank) == ("True", "False", "True")
    with process() as later:
        assert later == "True"

    # Where no lock can be had, nothing is known about others.
    lock, = tmp_path.iterdir()
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with process() as one, process() as two:
        assert (one, two) == ("True", "True")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name, value, shown", [
    ("GOMP_SPINCOUNT", "77", "GOMP_SPINCOUNT = '77'"),
    ("OMP_WAIT_POLICY", "PASSIVE", "GOMP_SPINCOUNT = '0'"),
])
def test_how_the_user_wants_threads_to_wait_stays(name, value, shown):
    assert shown in display("QuantDiT.py", **{name: value})
