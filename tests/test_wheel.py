"""``pip install .``: ditas outside the repository, and no other name in site-packages."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Runs where nothing of the repository can be found.
USE = """
import importlib, pkgutil, sys
from pathlib import Path

# Before anything of a user's is imported under these names.
generic = ("quant", "cli", "files", "models", "config", "errors", "architectures", "evaluation")
import ditas
assert "installed" in ditas.__file__
assert not set(generic) & set(sys.modules)

import torch
from diffusers import SD3Transformer2DModel
for module in pkgutil.walk_packages(ditas.__path__, "ditas."):
    importlib.import_module(module.name)
assert not set(generic) & set(sys.modules)

model = SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
    num_attention_heads=2, attention_head_dim=16, joint_attention_dim=24,
    caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=16).eval()
call = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([700, 20]),
        "encoder_hidden_states": torch.randn(2, 5, 24), "pooled_projections": torch.randn(2, 20)}
with torch.no_grad():
    print(ditas.quantize(model, lambda: model(**call), "smoothquant"))
    expected = model(**call).sample
    model.save_pretrained("folder")
    again = SD3Transformer2DModel.from_pretrained("folder")
    assert torch.equal(again(**call).sample, expected)
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Build a wheel from a copy of the repository, and install it into a folder of its own."""
    place = tmp_path_factory.mktemp("wheel")
    # Neither what git ignores nor what is large.
    aside = shutil.ignore_patterns(
        ".*", "build", "results", "samples", "pretrained_models", "assets", "tests", "examples")
    shutil.copytree(ROOT, place / "source", ignore=aside)
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "wheels",
        "./source", cwd=place)
    wheel = next((place / "wheels").iterdir())
    run(*pip, "install", "--no-deps", "--no-index", "--target", "installed", str(wheel), cwd=place)
    return place / "installed"


@pytest.mark.slow
def test_the_wheel_brings_one_name(installed):
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"ditas"}


@pytest.mark.slow
def test_an_installed_ditas_quantises_and_reads_back(installed, tmp_path):
    printed = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "smoothquant: 33 linears in 19 sites" in printed
