"""What surrounds the model when sampling: the npz stage, waiting for the disk, two processes.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --only npz

npz      10K images of 256x256: streamed from PNGs against all of them in one array (the published
         way), each in a process of its own
waiting  share of the sampling loop's wall time for which the model waits for encoding and writing,
         digits model
scaling  images per second of 1 and 2 processes, one thread each, digits model
"""
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cli.threads import wait_gently

wait_gently()  # before torch loads, which reads it once

import torch

from benchmarks.sections import run_sections
from benchmarks.subjects import load_bundled
from cards import DiT_models
from diffusion import ddpm_step, make_schedule
from diffusion.generate import batch_indices, decode_images, generate_latents, labels_for
from download import load_decoder
from sampling.folder import ImageFolder
from sampling.writer import BackgroundWriter

IMAGES = 10_000

# Programs that run in processes of their own, so that each has its own peak of memory.
PREPARE = """
import numpy as np
from PIL import Image
base = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
base = np.asarray(Image.fromarray(base).resize((256, 256), Image.BICUBIC))
for i in range({count}):
    folder.save(i, np.roll(base, i, axis=1))
"""
PUBLISHED = """
import numpy as np
from PIL import Image
samples = []
for i in range({count}):
    samples.append(np.asarray(Image.open(folder.file(i))).astype(np.uint8))
samples = np.stack(samples)
np.savez(out, arr_0=samples)
"""
STREAMED = """
folder.assemble(out, {count})
"""
FRAME = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from sampling.folder import ImageFolder
folder = ImageFolder(Path({images!r}), "0" * 16, 256)
out = Path({out!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
{body}
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024, time.perf_counter() - began)
"""


def npz() -> None:
    with tempfile.TemporaryDirectory() as place:
        images = Path(place) / "images"
        published = Path(place) / "published.npz"
        streamed = Path(place) / "streamed.npz"
        images.mkdir()
        run_program(PREPARE, images, Path(place) / "none")
        print(f"\n| npz of {IMAGES} images of 256x256 | peak memory above the start, MB | s |")
        print("|---|---|---|")
        for body, out in ((PUBLISHED, published), (STREAMED, streamed)):
            megabytes, seconds = run_program(body, images, out)
            print(f"| {out.stem} | {megabytes:.0f} | {seconds:.1f} |", flush=True)
        same = subprocess.run(["cmp", published, streamed]).returncode == 0
        print(f"\nsame bytes: {same}")


def run_program(body: str, images: Path, out: Path) -> tuple[float, float]:
    """Run a program in the frame; return its peak memory above the start in MB, and seconds."""
    body = body.format(count=IMAGES)
    text = FRAME.format(root=str(ROOT), images=str(images), out=str(out), body=body)
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    megabytes, seconds = done.stdout.split()
    return float(megabytes), float(seconds)


def waiting() -> None:
    model = load_bundled()
    decode = load_decoder(DiT_models["DiT-Digits"], "ema", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as place:
        folder = ImageFolder(Path(place), "0" * 16, 16)
        began = time.perf_counter()
        with BackgroundWriter(folder.save, 64) as writer:
            for batch in range(6):
                indices = batch_indices(batch, 64)
                labels = labels_for(indices, 0, 10, None)
                schedule = make_schedule("20")
                latents = generate_latents(model, schedule, indices, labels, 0, 1.5, ddpm_step)
                for index, pixels in zip(indices, decode_images(decode, latents)):
                    writer.put(index, pixels)
        seconds = time.perf_counter() - began
    print("\n| sampling loop, s | waiting for encoding and writing, s | share |")
    print("|---|---|---|")
    print(f"| {seconds:.1f} | {writer.waited:.3f} | {writer.waited / seconds:.2%} |")


def scaling() -> None:
    rates = {1: [], 2: []}
    for _ in range(3):
        for processes in rates:
            rates[processes].append(sampling_rate(processes))
    one = statistics.median(rates[1])
    two = statistics.median(rates[2])
    print("\n| processes, one thread each | images/s (median of 3) | ratio |")
    print("|---|---|---|")
    print(f"| 1 | {one:.1f} | 1 |")
    print(f"| 2 | {two:.1f} | {two / one:.2f} |")


def sampling_rate(processes: int) -> float:
    """Sample 384 images; return how many came per second."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        launcher += ["--nnodes=1", f"--nproc_per_node={processes}"]
        script = [str(ROOT / "sample_merge_TAS.py"), "--model", "DiT-Digits"]
        script += ["--num-fid-samples", "384", "--per-proc-batch-size", "32"]
        script += ["--num-sampling-steps", "20", "--threads", "1"]
        script += ["--sample-dir", place, "--log-file", str(log)]
        subprocess.run(launcher + script, check=True, capture_output=True)
        match = re.search(r"384/384 images, ([\d.]+) images/s", log.read_text())
    return float(match[1])


if __name__ == "__main__":
    run_sections(__doc__, {"npz": npz, "waiting": waiting, "scaling": scaling})
