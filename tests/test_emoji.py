"""The colour test bed: its data, its VAE, its training, and its models through the registry."""
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative
from torch import nn

from cards import DiT_models
from diffusion import make_schedule
from download import load_decoder, load_model
from errors import UserError
from evaluation.metrics import sqnr_db
from examples.emoji import autoencoder, data, rebuild, training
from examples.emoji.dit import image_weights, snr_weights
from examples.emoji.outliers import WEIGHTS, outlier_ratios
from files.npz import read_arrays
from models import build_model

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PACKAGE = "emoji-datasource-google-16.0.0.tgz"


def test_data_are_the_emoji_of_the_package():
    emoji = data.load_emoji()
    assert emoji.images.shape == (1911, 64, 64, 3) and emoji.images.dtype == np.uint8
    assert len(set(emoji.names.tolist())) > 1900
    assert len(set(emoji.categories.tolist())) == 10
    assert len(set(emoji.subcategories.tolist())) == 99
    # Red over white: the heart's middle, and a corner.
    heart = emoji.images[emoji.names.tolist().index("heavy black heart")]
    red, green, blue = heart[32, 32].astype(int)
    assert red > 200 > 100 > max(green, blue)
    assert (heart[0, 0] == 255).all()
    assert data.BUNDLED.stat().st_size < 6e6


def test_classes_are_the_subcategories_of_what_is_drawn():
    emoji, names = data.drawn_emoji(), data.class_names()
    assert len(emoji) == 459 and len(names) == DiT_models["DiT-Emoji"].num_classes == 31
    labels = data.class_labels(emoji)
    assert [names[label] for label in labels] == emoji.subcategories.tolist()
    categories = data.class_categories()
    assert [categories[label] for label in labels] == emoji.categories.tolist()


def test_reference_holds_the_images_and_their_mirror_images(tmp_path):
    images = read_arrays(data.write_reference(tmp_path / "reference.npz"))["arr_0"]
    assert np.array_equal(images[:459], data.drawn_emoji().images)
    assert np.array_equal(images[459:], data.drawn_emoji().images[:, :, ::-1])


@pytest.mark.slow
def test_data_rebuilt_from_the_package_are_the_bundled_ones(tmp_path):
    npm = shutil.which("npm")
    command = [npm or "npm", "pack", "emoji-datasource-google@16.0.0"]
    if npm is None or subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("the package cannot be had")
    out, tones = tmp_path / "emoji.npz", tmp_path / "tones.npz"
    command = [sys.executable, "-m", "examples.emoji.rebuild", tmp_path / PACKAGE]
    subprocess.run([*command, "--out", out, "--tones", tones], cwd=ROOT, check=True)
    bundled, rebuilt = read_arrays(data.BUNDLED), read_arrays(out)
    assert bundled.keys() == rebuilt.keys()
    assert all(np.array_equal(bundled[name], rebuilt[name]) for name in bundled)
    images, base = data.load_tones(tones)
    assert len(images) == len(base) == 1875 and base.max() < 1911


def test_transparent_pixels_become_white(tmp_path):
    from PIL import Image
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.putpixel((3, 5), (200, 100, 0, 255))
    picture.putpixel((4, 5), (0, 0, 0, 51))
    picture.save(tmp_path / "a.png")
    pixels = rebuild.on_white((tmp_path / "a.png").read_bytes())
    assert pixels[5, 3].tolist() == [200, 100, 0]
    assert pixels[5, 4].tolist() == [204, 204, 204]
    assert (pixels[0] == 255).all()


def test_what_is_no_package_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.tgz").write_bytes(b"nothing")
    command = [sys.executable, "-m", "examples.emoji.rebuild", tmp_path / "bad.tgz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "expected npm's .tgz" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def random_vae() -> nn.Module:
    torch.manual_seed(0)
    return autoencoder.build_autoencoder().eval()


def test_whitened_latents_decode_to_the_same_images():
    vae = random_vae()
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(vae, images)
        before = vae.decode(latents).sample
        variance = autoencoder.mean_variance(vae, images)
        autoencoder.whiten_latents(vae, latents, variance)
        whitened = autoencoder.encode(vae, images)
        after = vae.decode(whitened).sample
        noise = vae.encode(images).latent_dist.var
    assert relative(after, before) < 1e-3
    columns = (vae.config.scaling_factor * whitened).transpose(0, 1).flatten(1).numpy()
    assert np.allclose(columns.mean(1), 0, atol=1e-2)
    assert np.allclose(np.cov(columns), np.eye(4), atol=1e-2)
    # What whitening does to a variance, from images that went through it.
    raw = latents.transpose(0, 1).flatten(1).numpy()
    design = np.vstack([raw, np.ones(raw.shape[1])]).T
    mix = np.linalg.lstsq(design, columns.T, rcond=None)[0][:4].T / vae.config.scaling_factor
    expected = mix ** 2 @ variance.numpy()
    assert np.allclose(noise, expected.reshape(1, 4, 1, 1), rtol=1e-2)


def test_vae_folder_loads_and_a_damaged_one_is_refused(tmp_path):
    vae = random_vae()
    vae.half().save_pretrained(tmp_path / "vae")
    loaded = autoencoder.load_autoencoder(tmp_path / "vae")
    assert not loaded.training
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, vae.state_dict()[key].float())
    weights = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the VAE from .*expected config.json"):
        autoencoder.load_autoencoder(tmp_path / "vae")
    with pytest.raises(UserError, match="cannot load the VAE"):
        autoencoder.load_autoencoder(tmp_path / "nothing")


def test_bundled_vae_reconstructs():
    vae = autoencoder.load_autoencoder()
    assert 1e6 < sum(value.numel() for value in vae.parameters()) < 2e6
    assert sum(path.stat().st_size for path in autoencoder.FOLDER.iterdir()) < 4e6
    images = data.to_tensor(data.load_emoji().images[20::40])
    assert autoencoder.reconstruction_psnr(vae, images) > 25
    latents = vae.config.scaling_factor * autoencoder.encode(vae, images)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.2)
    # The decoder that sampling uses undoes the factor.
    decoded = load_decoder(DiT_models["DiT-Emoji"], "ema", CPU)(latents)
    assert ((decoded - images) / 2).square().mean() < 10 ** -2.3


def test_skin_tones_are_asked_for(tmp_path):
    with pytest.raises(UserError, match="python -m examples.emoji.rebuild"):
        data.load_tones(tmp_path / "tones.npz")


def test_augmented_images_are_moved_over_white():
    image = torch.full((400, 3, 12, 12), 1.0)
    image[:, :, 5, 4] = -1.0
    moved = autoencoder.augment(image)
    assert (moved.flatten(1).sum(1) == image.flatten(1).sum(1)).all()
    _, _, rows, columns = (moved == -1).nonzero().T
    assert rows.min() == 1 and rows.max() == 9
    # Flipped, column 4 is column 7.
    assert columns.min() == 0 and columns.max() == 11


def test_rare_classes_are_drawn_as_often_as_the_root_of_their_size():
    labels = torch.tensor([0] * 16 + [1])
    weights = image_weights(labels)
    assert weights[:16].sum() / weights[16] == pytest.approx(4)


def test_loss_weights_are_those_of_min_snr():
    schedule = make_schedule()
    weights = snr_weights(schedule)
    a = schedule.alphas_cumprod[700]
    assert a / (1 - a) < 5 and weights[700] == 1
    a = schedule.alphas_cumprod[10]
    assert float(weights[10]) == pytest.approx(5 * (1 - a) / a)


def train_small(path: Path, stop: int | None = None) -> torch.Tensor:
    """Train for eight steps and return the averaged weight; be interrupted before one is saved."""
    torch.manual_seed(3)
    model = nn.Linear(4, 1)
    average = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    run = training.Run("small", path, model, average, optimizer, {})

    def loss() -> torch.Tensor:
        x = torch.randn(5, 4)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    def watch(run: training.Run, step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    with torch.enable_grad():
        training.train(run, loss, 8, peak=0.1, decay=0.9, watch=watch)
    return average.weight


def test_interrupted_training_ends_in_the_same_weights(tmp_path, monkeypatch):
    # A state after every step.
    monkeypatch.setattr(training, "SAVE_SECONDS", -1)
    whole = train_small(tmp_path / "whole.pt")
    for stop in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            train_small(tmp_path / "parts.pt", stop)
    assert torch.equal(train_small(tmp_path / "parts.pt"), whole)


def test_ratios_find_the_outlier_channel():
    model = build_model(DiT_models["DiT-Emoji"], 64)
    torch.manual_seed(0)
    model.initialize_weights()
    latents, labels = torch.randn(16, 4, 16, 16), torch.arange(16)
    schedule = make_schedule()
    before = outlier_ratios(model, schedule, latents, labels)
    assert len(before) == 4 * 8 and max(before.values()) < 20
    with torch.no_grad():
        # Channel 5 of what the third block's fc1 reads: its scale.
        model.blocks[2].adaLN_modulation[1].bias[4 * 192 + 5] = 99.0
    after = outlier_ratios(model, schedule, latents, labels)
    name = "blocks.2.mlp.fc1"
    assert after[name] == pytest.approx(100, rel=0.5)
    assert after["blocks.1.mlp.fc1"] == before["blocks.1.mlp.fc1"]


def test_models_come_through_the_registry_without_a_download():
    loaded = {}
    for name in ("DiT-Emoji", "DiT-Emoji-Outliers"):
        loaded[name] = load_model(name, DiT_models[name], 64, 31, None, CPU)
    assert WEIGHTS.stat().st_size < 14e6
    latents, labels = torch.randn(8, 4, 16, 16), torch.arange(8)
    schedule = make_schedule()
    plain = outlier_ratios(loaded["DiT-Emoji"], schedule, latents, labels)
    twin = outlier_ratios(loaded["DiT-Emoji-Outliers"], schedule, latents, labels)
    assert np.median(list(twin.values())) > 3 * np.median(list(plain.values()))
    inputs = latents, torch.full((8,), 500), labels
    with torch.no_grad():
        outputs = [model(*inputs)[:, :4] for model in loaded.values()]
    assert sqnr_db(*outputs) > 20
