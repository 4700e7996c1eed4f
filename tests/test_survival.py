"""Sampling runs that are killed, stopped, doubled, damaged and starved.

Processes that are killed are real, and so are the signals. What follows one another runs here.
"""
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import call, error_line
from PIL import Image

import sample_merge_TAS

SCRIPT = Path(__file__).parents[1] / "sample_merge_TAS.py"
COUNT, BATCH = 90, 4  # not divisible
PATIENCE = 600  # seconds, for machines with other work
SETTINGS = ("--model", "DiT-Digits", "--num-sampling-steps", "6",
            "--per-proc-batch-size", str(BATCH), "--threads", "1")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(
    folder: Path,
    *more,  # of the command line
    processes: int | None = None,  # of torchrun; None: no torchrun
    count: int = COUNT,  # images
    restarts: int = 0,  # that torchrun may do
    settings: tuple[str, ...] = SETTINGS,
) -> subprocess.Popen:
    torchrun = []
    if processes is not None:
        torchrun = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={processes}",
                    "--monitor-interval=0.1", f"--max-restarts={restarts}",
                    f"--master-port={free_port()}"]
    wanted = ["--num-fid-samples", str(count), "--sample-dir", str(folder), *map(str, more)]
    command = [sys.executable, *torchrun, str(SCRIPT), *settings, *wanted]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment)


def sample_here(folder: Path, *more, count: int = COUNT) -> None:
    """Run the script in this process, and to its end."""
    wanted = ("--num-fid-samples", count, "--sample-dir", folder)
    call(sample_merge_TAS, *SETTINGS, *wanted, *more)


def finish(run: subprocess.Popen, status: int = 0) -> str:
    """Wait for it; returns stderr without progress bars."""
    _, stderr = run.communicate(timeout=PATIENCE)
    assert run.returncode == status, stderr
    return "\n".join(line for line in re.split(r"[\r\n]", stderr) if line and "image/s" not in line)


def images_of(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.is_dir())


def npz(folder: Path) -> bytes:
    return next(folder.glob("*.npz")).read_bytes()


def made(folder: Path) -> int:
    return len(list(folder.glob("*/[0-9]*.png")))


def wait_for_images(folder: Path, count: int, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while made(folder) < count and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(launcher: int) -> list[psutil.Process]:
    try:
        children = psutil.Process(launcher).children(recursive=True)
        return [child for child in children if SCRIPT.name in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The ``.npz`` of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    finish(launch(folder))
    return npz(folder)


@pytest.mark.parametrize("processes", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path, whole, processes):
    finish(launch(tmp_path, processes=processes))
    assert npz(tmp_path) == whole


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    for number in range(kills):
        run = launch(folder, processes=2)
        while not ranks_of(run.pid):
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        if number % 4:
            wait_for_images(folder, made(folder) + chance.randint(1, 3), run)
            time.sleep(chance.uniform(0, 0.05))  # a batch takes less
        else:
            time.sleep(chance.uniform(0, 0.3))  # it still starts
        ranks = ranks_of(run.pid)
        victim = psutil.Process(run.pid) if number % 2 or not ranks else chance.choice(ranks)
        victim.kill()
        assert run.wait(60) != 0
        _, alive = psutil.wait_procs(ranks, 20)
        assert not alive, "ranks outlive their launcher"
        run.communicate()
        assert not list(folder.glob("*.npz")), "the run was over before it could be killed"
        if number % 2:  # there is always something left to do
            for image in list(folder.glob("*/[0-9]*.png"))[::2]:
                image.unlink()


def test_killed_runs_complete_to_the_same_bytes(tmp_path, whole):
    kill_and_resume(tmp_path, 3, seed=0)
    assert 0 < made(tmp_path) < COUNT
    finish(launch(tmp_path, processes=2))
    assert npz(tmp_path) == whole
    assert not list(tmp_path.glob("*/.*.tmp")) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_killed_runs_complete_to_the_same_bytes(tmp_path, whole, seed):
    kill_and_resume(tmp_path, 10, seed)
    finish(launch(tmp_path, processes=2))
    assert npz(tmp_path) == whole


def test_torchrun_restarts_what_was_killed(tmp_path, whole):
    run = launch(tmp_path, processes=2, restarts=1)
    wait_for_images(tmp_path, 2 * BATCH, run)
    ranks_of(run.pid)[-1].kill()
    finish(run)
    assert npz(tmp_path) == whole


def test_sigterm_finishes_the_batch_and_says_how_to_go_on(tmp_path, whole):
    run = launch(tmp_path)
    wait_for_images(tmp_path, BATCH, run)
    run.send_signal(signal.SIGTERM)
    assert "the same command continues" in finish(run, 128 + signal.SIGTERM)
    assert 0 < made(tmp_path) < COUNT and made(tmp_path) % BATCH == 0
    assert not list(tmp_path.glob("*/.*.tmp"))
    finish(launch(tmp_path))
    assert npz(tmp_path) == whole


def test_a_second_live_run_is_refused(tmp_path, whole):
    first = launch(tmp_path)
    wait_for_images(tmp_path, 1, first)
    first.send_signal(signal.SIGSTOP)  # so that it is not over before the second one has started
    refused = finish(launch(tmp_path), 2)
    assert re.fullmatch(rf".*another run is writing to .*process {first.pid} on .*", refused)
    first.send_signal(signal.SIGCONT)
    finish(first)
    assert npz(tmp_path) == whole


def test_damaged_and_foreign_images_are_made_again_and_changed_settings_refused(
        tmp_path, whole, capsys):
    sample_here(tmp_path, count=16)
    folder = images_of(tmp_path)
    (folder / "000003.png").write_bytes((folder / "000003.png").read_bytes()[:-20])
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "000007.png")
    (folder / "000008.png").unlink()
    before = {name: (folder / name).stat().st_mtime_ns for name in ("000000.png", "000012.png")}
    refused = error_line(
        capsys, lambda: sample_here(tmp_path, "--threads", 2, "--per-proc-batch-size", 8))
    assert "batch is 4 there, 8 now; threads is 1 there, 2 now" in refused
    assert "--overwrite" in refused
    sample_here(tmp_path)  # and more of them
    assert npz(tmp_path) == whole
    # The first batch lacked image 3 and was made whole.
    assert (folder / "000000.png").stat().st_mtime_ns != before["000000.png"]
    assert (folder / "000012.png").stat().st_mtime_ns == before["000012.png"]
    sample_here(tmp_path, "--per-proc-batch-size", 8, "--overwrite")
    assert '"batch": 8' in (folder / "manifest.json").read_text()
    assert len(npz(tmp_path)) == len(whole)


def test_shards_assemble_to_the_same_bytes(tmp_path, whole, capsys):
    runs = [launch(tmp_path, "--shard", f"{k}/3") for k in (0, 2)]
    for run in runs:
        finish(run)
    first_of_shard_1 = f"{BATCH:06d}.png is missing"
    assert first_of_shard_1 in error_line(capsys, lambda: sample_here(tmp_path, "--assemble"))
    assert not list(tmp_path.glob("*.npz"))
    sample_here(tmp_path, "--shard", "1/3")
    sample_here(tmp_path, "--assemble")
    assert npz(tmp_path) == whole


@pytest.mark.parametrize("words, message", [
    (("--shard", "3/3"), "bad --shard '3/3'"),
    (("--shard", "1"), "bad --shard '1'"),
    (("--shard", "0/2", "--assemble"), "--shard is for jobs of one process"),
    (("--shard", "0/2", "--overwrite"), "--overwrite would delete what other shards made"),
    (("--assemble", "--overwrite"), "--overwrite would delete"),
    (("--log-file", "nowhere/log"), "cannot write --log-file 'nowhere/log'"),
    (("--decode-batch-size", "0"), "--decode-batch-size 0 is too small"),
    (("--class-labels", "balance"), "bad class labels 'balance'"),
])
def test_wrong_flags(tmp_path, capsys, words, message):
    line = error_line(capsys, lambda: sample_here(tmp_path, *words))
    assert message in line and not list(tmp_path.glob("*/*"))


def test_a_full_disk_gives_one_line_and_the_next_run_completes(tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        # Without the right to mount: /dev/full truly raises ENOSPC.
        more = () if mounted else ("--log-file", "/dev/full")
        full = finish(launch(disk, *more), 1)
        message = (r"sample_merge_TAS.py: error: cannot write to '.*': No space left on device; "
                   "make room, then run the same command again")
        assert re.fullmatch(message, full)
        if mounted:
            assert 0 < made(disk) < COUNT and not list(disk.glob("*/.*.tmp"))
            subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        finish(launch(disk))
        assert npz(disk) == whole
    finally:
        if mounted:
            subprocess.run(["umount", "-l", disk], check=True)


def test_log_and_balanced_labels(tmp_path):
    log = tmp_path / "log"
    sample_here(tmp_path / "a", "--class-labels", "balanced", "--log-file", log, count=20)
    sample_here(tmp_path / "b", "--class-labels", "0,1,2,3,4,5,6,7,8,9", count=20)
    assert npz(tmp_path / "a") == npz(tmp_path / "b")
    lines = log.read_text().splitlines()
    last = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} 20/20 images, \d+\.\d\d images/s"
    assert len(lines) == 5 and re.fullmatch(last, lines[-1])


NPZ_PROGRAM = """
import resource, sys
from pathlib import Path
import numpy as np
from files.npz import read_arrays, write_npz
path, count = Path(sys.argv[1]), int(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
base = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
write_npz(path, (base + np.uint8(i % 251) for i in range(count)), (count, 256, 256, 3))
images = read_arrays(path)["arr_0"]
assert all((images[i] == base + np.uint8(i % 251)).all() for i in (0, 1, count // 2, count - 1))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_an_npz_over_four_gibibytes_needs_little_memory(tmp_path):
    count = 2 ** 32 // (256 * 256 * 3) + 100
    big = tmp_path / "big.npz"
    done = subprocess.run([sys.executable, "-c", NPZ_PROGRAM, big, str(count)],
                          capture_output=True, text=True, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200 and big.stat().st_size > 2 ** 32
    # numpy reads the same header.
    with np.load(big) as file, file.zip.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape = np.lib.format.read_array_header_1_0(member)[0]
    assert shape == (count, 256, 256, 3)
