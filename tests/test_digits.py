"""The embedded test bed: what is bundled is what it says it is."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import block_linears, random_model, relative
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from architectures.hooked import hooked
from cards import DiT_models
from diffusion import ddpm_step, make_schedule
from diffusion.generate import generate_latents
from download import load_model
from evaluation.metrics import sqnr_db
from examples.digits import classifier, outliers
from examples.digits.data import decode, encode, load_images
from models import build_model

ROOT = Path(__file__).parents[1]


def model_of(name):
    return load_model(name, DiT_models[name], 16, 10, None, torch.device("cpu"))


def test_data_are_the_real_digits():
    images, labels = load_images()
    assert images.shape == (1797, 1, 16, 16) and images.min() >= -1 and images.max() <= 1
    original = load_digits()
    assert labels.tolist() == original.target.tolist()
    means = (images.mean((1, 2, 3)) + 1) * 8
    # Bilinear resizing keeps the mean but for the rim.
    assert np.allclose(means, original.images.mean((1, 2)), atol=0.3)
    latents = encode(images)
    assert latents.shape == (1797, 4, 8, 8) and torch.equal(decode(latents), images)


def test_bundled_weights_are_small_and_complete():
    assert outliers.WEIGHTS.stat().st_size + classifier.WEIGHTS.stat().st_size < 8e6
    assert all(value.dtype == torch.float16 for value in load_file(outliers.WEIGHTS).values())


def test_classifier_reads_the_real_digits():
    images, labels = load_images()
    assert (classifier.load_classifier()(images).argmax(1) == labels).float().mean() > 0.99


def outlier_ratio(model):
    """Run the model once; return each linear's largest channel magnitude over the median one."""
    ratios = {}

    def see(name, x, _):
        a = x.abs().amax((0, 1))
        ratios[name] = float(a.max() / a.median())
    with hooked(model, list(block_linears(model)), see):
        model(torch.randn(8, 4, 8, 8), torch.full((8,), 500), torch.arange(8))
    return ratios


@pytest.fixture(scope="module")
def samples():
    schedule, labels = make_schedule("50"), torch.arange(60) % 10
    with torch.no_grad():
        return {
            name: generate_latents(model_of(name), schedule, range(60), labels, 0, 1.5, ddpm_step)
            for name in ("DiT-Digits", "DiT-Digits-Outliers")
        }


def test_the_model_draws_the_digit_it_is_asked_for(samples):
    reader, labels = classifier.load_classifier(), torch.arange(60) % 10
    for latents in samples.values():
        assert (reader(decode(latents)).argmax(1) == labels).float().mean() >= 0.97


def test_the_twin_has_outliers_and_draws_nearly_the_same(samples):
    plain = outlier_ratio(model_of("DiT-Digits"))
    twin = outlier_ratio(model_of("DiT-Digits-Outliers"))
    assert np.median(list(plain.values())) < 10
    assert np.median(list(twin.values())) > 15
    assert sqnr_db(*samples.values()) > 30


def test_outliers_are_exact_but_for_gelu():
    """With fc1 and fc2 put back, the rewritten weights compute the same function."""
    model = random_model()
    before = model.state_dict()
    state = outliers.add_outliers(before, seed=1)
    assert not torch.equal(state["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([3, 300, 900]), torch.tensor([1, 2, 10])
    expected = model(*inputs)
    # Undo the rows of fc1 (but not its columns, which go with adaLN) and the columns of fc2.
    for i in range(2):
        rows = state[f"blocks.{i}.mlp.fc1.bias"] / before[f"blocks.{i}.mlp.fc1.bias"]
        state[f"blocks.{i}.mlp.fc1.weight"] /= rows[:, None]
        state[f"blocks.{i}.mlp.fc1.bias"] /= rows
        state[f"blocks.{i}.mlp.fc2.weight"] *= rows
    twin = random_model()
    twin.load_state_dict(state)
    assert relative(twin(*inputs), expected) < 1e-4
    again = outliers.add_outliers(before, seed=1)
    assert all(torch.equal(again[key], outliers.add_outliers(before, seed=1)[key]) for key in again)


def test_training_runs_and_writes_both_files(tmp_path):
    command = [sys.executable, "-m", "examples.digits.train", "--out", str(tmp_path)]
    command += ["--steps", "3", "--batch", "8", "--epochs", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    model = build_model(DiT_models["DiT-Digits"], 16)
    assert shapes(load_file(tmp_path / "dit.safetensors")) == shapes(model.state_dict())
    written = load_file(tmp_path / "classifier.safetensors")
    assert written.keys() == classifier.DigitClassifier().state_dict().keys()


def shapes(state):
    return {key: value.shape for key, value in state.items()}


def test_sqnr_is_in_decibels():
    x = torch.ones(100)
    assert sqnr_db(x, x + 0.1) == pytest.approx(20, abs=1e-5)
    assert sqnr_db(x, x) == float("inf")
