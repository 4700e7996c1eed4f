"""Folders go from one version of diffusers to another: 0.36, the oldest that is supported."""
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call

import QuantDiT

ROOT = Path(__file__).parents[1]
OLDEST = "0.36"
# Quantises and saves a pipeline; or loads it again; then samples, and says in which version.
USE = """
import sys
import diffusers, torch
import ditas
from architectures.examples import EXAMPLES, TEXT, TEXT_WIDTH, build

def sample(pipe):
    torch.manual_seed(0)
    return pipe(
        prompt_embeds=torch.randn(1, TEXT, TEXT_WIDTH), pooled_prompt_embeds=torch.randn(1, 20),
        height=64, width=64, num_inference_steps=3, output_type="latent").images

do, folder, images = sys.argv[1:]
# The oldest version wants to be told that there are none.
parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
if do == "save":
    example = next(e for e in EXAMPLES if e.class_name == "FluxTransformer2DModel")
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), transformer=build(example), **parts)
    ditas.quantize(pipe.transformer, lambda: sample(pipe), "ditas",
                   group_size=1024, adaln_weight_bit=16, backend="fake")
    pipe.save_pretrained(folder)
else:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **parts)
torch.save(sample(pipe), images)
print(diffusers.__version__)
"""
# Samples the folder of a checkpoint.
SAMPLE = """
import sys
import diffusers, numpy, torch
import ditas
from ditas.switching import switch_backend

folder, images = sys.argv[1:]
pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
switch_backend(pipe.transformer, "fake")
noise = torch.Generator().manual_seed(0)
torch.save(numpy.stack(pipe([3, 0], num_inference_steps=3, generator=noise).images), images)
print(diffusers.__version__)
"""


def run(script: str, images: Path, words: list[str | Path], *paths: Path) -> tuple[Any, str]:
    """Run a script in a process of its own, which looks for packages in these paths first.

    Returns:
        The images that it saved, and the version of diffusers that it printed.
    """
    search = os.pathsep.join(map(str, [*paths, ROOT]))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words), str(images)], cwd=images.parent,
        env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(images, weights_only=False), done.stdout.strip()


@pytest.fixture(scope="module")
def oldest(tmp_path_factory) -> Path:
    """Install the oldest diffusers, and httpx that it needs, beside the environment."""
    place = tmp_path_factory.mktemp("diffusers")
    for wanted in (["--no-deps", f"diffusers=={OLDEST}.*"], ["httpx<1"]):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place), *wanted],
            capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{wanted[-1]} cannot be had here")
    return place


@pytest.mark.slow
def test_a_folder_is_read_by_both_versions(oldest, tmp_path):
    folder, images = tmp_path / "pipeline", tmp_path / "images"
    for first, second in [((), (oldest,)), ((oldest,), ())]:
        saved, one = run(USE, images, ["save", folder], *first)
        loaded, other = run(USE, images, ["load", folder], *second)
        assert (one if first else other).startswith(f"{OLDEST}.")
        assert one != other
        assert torch.equal(saved, loaded)


@pytest.mark.slow
def test_an_exported_checkpoint_is_read_by_both_versions(oldest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(QuantDiT, "--model", "DiT-Digits", "--recipe", "rtn", "--class-labels", "1",
         "--num-sampling-steps", "2", "--output", "made", "--export", "diffusers")
    folder, images = tmp_path / "made-diffusers", tmp_path / "images"
    ours, newest = run(SAMPLE, images, [folder])
    theirs, old = run(SAMPLE, images, [folder], oldest)
    assert old.startswith(f"{OLDEST}.") and not newest.startswith(f"{OLDEST}.")
    assert np.array_equal(ours, theirs)
