"""What surrounds the model when sampling: the npz stage, waiting for the disk, and two processes against one.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --only npz

npz      10K images of 256x256: streamed from PNGs against all of them in one array (the published way), each in a process of its own
waiting  share of the sampling loop's wall time for which the model waits for encoding and writing, digits model
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

import torch

from benchmarks.sections import run_sections

IMAGES = 10_000

PREPARE = """
import numpy as np
from PIL import Image
base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((256, 256), Image.BICUBIC)
base = np.asarray(base)
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
folder, out = ImageFolder(Path({images!r}), "0" * 16, 256), Path({out!r})
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
{body}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.perf_counter() - began)
"""


def npz() -> None:
    with tempfile.TemporaryDirectory() as place:
        images = Path(place) / "images"
        images.mkdir()

        def program(body: str, out: str) -> list[float]:
            text = FRAME.format(root=str(ROOT), images=str(images), out=f"{place}/{out}", body=body.format(count=IMAGES))
            return [float(word) for word in subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout.split()]
        program(PREPARE, "none")
        print(f"\n| npz of {IMAGES} images of 256x256 | peak memory above the start, MB | s |\n|---|---|---|")
        for name, body in (("published", PUBLISHED), ("streamed", STREAMED)):
            memory, seconds = program(body, f"{name}.npz")
            print(f"| {name} | {memory:.0f} | {seconds:.1f} |", flush=True)
        same = subprocess.run(["cmp", f"{place}/published.npz", f"{place}/streamed.npz"]).returncode == 0
        print(f"\nsame bytes: {same}")


def waiting() -> None:
    from diffusion import ddpm_step, make_schedule
    from diffusion.generate import batch_indices, generate_images, labels_for
    from download import load_decoder, load_model
    from models import DiT_models
    from sampling.folder import ImageFolder
    from sampling.writer import BackgroundWriter
    card, device = DiT_models["DiT-Digits"], torch.device("cpu")
    model, decode = load_model("DiT-Digits", card, 16, 10, None, device), load_decoder(card, "ema", device)
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        with BackgroundWriter(ImageFolder(Path(place), "0" * 16, 16).save, 64) as writer:
            for batch in range(6):
                indices = batch_indices(batch, 64)
                images = generate_images(model, decode, make_schedule("20"), indices, labels_for(indices, 0, 10, None), 0, 1.5, ddpm_step)
                for index, pixels in zip(indices, images):
                    writer.put(index, pixels)
        seconds = time.perf_counter() - began
    print(f"\n| sampling loop, s | waiting for encoding and writing, s | share |\n|---|---|---|\n| {seconds:.1f} | {writer.waited:.3f} | {writer.waited / seconds:.2%} |")


def scaling() -> None:
    rates = {1: [], 2: []}
    for _ in range(3):
        for processes in rates:
            with tempfile.TemporaryDirectory() as place:
                command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={processes}", str(ROOT / "sample_merge_TAS.py"),
                           "--model", "DiT-Digits", "--num-fid-samples", "384", "--per-proc-batch-size", "32", "--num-sampling-steps", "20", "--threads", "1",
                           "--sample-dir", place, "--log-file", f"{place}/log"]
                subprocess.run(command, check=True, capture_output=True)
                rates[processes].append(float(re.search(r"384/384 images, ([\d.]+) images/s", Path(f"{place}/log").read_text())[1]))
    one, two = (statistics.median(rates[processes]) for processes in (1, 2))
    print(f"\n| processes, one thread each | images/s (median of 3) | ratio |\n|---|---|---|\n| 1 | {one:.1f} | 1 |\n| 2 | {two:.1f} | {two / one:.2f} |")


if __name__ == "__main__":
    run_sections(__doc__, {"npz": npz, "waiting": waiting, "scaling": scaling})
