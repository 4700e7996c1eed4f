"""Models named by an id of the hub: from a cache made by hand, without a network."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import call, error_line
from test_hand_over import ROOT, WEIGHTS
from test_inspect import FLUX, table
from test_pipelines import FLAGS, WORDS, float_folder  # noqa: F401

import compare
import QuantDiT
from cli.call_arguments import read as read_call
from cli.hub import is_hub_id
from cli.pipelines import folder_of, prompts_file
from comparison.runner import Comparison
from comparison.table import find_subjects

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(WORDS))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Make an empty cache, and forbid the network; returns HF_HOME."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "home"


def snapshot(home: Path, name: str) -> Path:
    """Make the folder of a model in a cache, as huggingface_hub lays it out."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = place / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(COMMIT)
    return folder


def test_a_cached_pipeline_is_quantised(cache, float_folder):  # noqa: F811
    shutil.copytree(float_folder, snapshot(cache, "own/emoji"), dirs_exist_ok=True)
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "QuantDiT.py"), "--model", "own/emoji", *FLAGS,
         "--prompts", "prompts.txt"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrote results/emoji-W4A8-smoothquant" in done.stdout

    # The same as of the folder itself.
    call(QuantDiT, "--model", str(float_folder), "--prompts", "prompts.txt", *FLAGS,
         "--output", "made")
    weights = f"transformer/{WEIGHTS}"
    folders = Path("results/emoji-W4A8-smoothquant"), Path("made")
    assert len({(folder / weights).read_bytes() for folder in folders}) == 1


def test_a_cached_pipeline_is_compared(cache, float_folder, monkeypatch):  # noqa: F811
    """The folder in the cache is what quantising and sampling are given; the id is its name."""
    folder = snapshot(cache, "own/emoji")
    shutil.copytree(float_folder, folder, dirs_exist_ok=True)
    given = []

    def sampled(self, words, folder):
        given.append(words)
        raise InterruptedError

    monkeypatch.setattr(Comparison, "sample", sampled)
    with pytest.raises(InterruptedError):
        call(compare, "--model", "own/emoji", "--recipes", "rtn", "--output", "compared")
    assert given[0][given[0].index("--path") + 1] == str(folder)
    (subject,) = find_subjects(compare.make_parser().parse_args(["--model", "own/emoji"]))
    assert subject.title.startswith("emoji, ")
    assert subject.setting[0] == "own/emoji"
    words = subject.quantising_arguments(subject.jobs[1], Path("made"))
    assert words[words.index("--model") + 1] == str(folder)


def test_what_a_cached_folder_says_of_its_calls_is_read(cache):
    folder = snapshot(cache, "own/flux")
    (folder / "model_index.json").write_text("{}")
    (folder / "call.json").write_text('{"height": 8}')
    (folder / "prompts.txt").write_text("lion")
    assert folder_of("own/flux") == folder
    assert read_call(folder) == {"height": 8}
    assert prompts_file(None, folder) == folder / "prompts.txt"


@pytest.mark.parametrize("files", [
    {"model_index.json": {"_class_name": "FluxPipeline", "transformer": ["diffusers"]},
     "transformer/config.json": FLUX},
    {"config.json": FLUX},
])
def test_a_cached_configuration_is_inspected(files, cache, capsys):
    folder = snapshot(cache, "own/flux")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    _, lines = table(capsys, "--model", "own/flux", "--recipe", "rtn")
    assert lines[0].startswith("FluxTransformer2DModel: 8 blocks")


@pytest.mark.parametrize("script, flags", [
    (QuantDiT, ("--inspect",)), (QuantDiT, ()), (compare, ())])
def test_what_is_not_cached_is_one_line(script, flags, cache, capsys):
    line = error_line(capsys, lambda: call(script, "--model", "own/other", *flags))
    assert "'own/other' is no folder, and the hub did not give it (" in line
    assert not Path("results").exists()


def test_parts_that_are_not_cached_are_one_line(cache, capsys):
    """What ``--inspect`` has fetched is not the whole pipeline."""
    folder = snapshot(cache, "own/flux")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
             "vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    line = error_line(capsys, lambda: call(
        QuantDiT, "--model", "own/flux", "--recipe", "rtn", "--output", "made"))
    assert "cannot load the pipeline in" in line and "own--flux" in line
    assert not Path("made").exists()


def test_only_what_a_pipeline_reads_is_fetched(monkeypatch):
    from fnmatch import fnmatch

    import huggingface_hub

    from cli.hub import fetch_parts
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **patterns: asked.update(patterns) or "folder")
    assert fetch_parts("own/flux", ["transformer", "tokenizer"]) == Path("folder")

    def is_fetched(file: str) -> bool:
        wanted, refused = (any(fnmatch(file, pattern) for pattern in asked[key])
                           for key in ("allow_patterns", "ignore_patterns"))
        return wanted and not refused

    assert all(map(is_fetched, [
        "model_index.json", "transformer/config.json", "tokenizer/merges.txt",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"]))
    assert not any(map(is_fetched, [
        "flux1-schnell.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.bin", "text_encoder/model.safetensors"]))


@pytest.mark.parametrize("name, expected", [
    ("black-forest-labs/FLUX.1-schnell", True), ("facebook/DiT-XL-2-256", True),
    ("DiT-XL/2", False), ("DiT-XXL/2", False), ("DiT-Digits", False), ("a/b/c", False),
    ("made/emoji", False), (None, False)])
def test_ids_are_told_from_models_of_this_repository_and_folders(name, expected):
    Path("made/emoji").mkdir(parents=True)
    assert is_hub_id(name) == expected
