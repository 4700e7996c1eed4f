"""Weights from files, folders and servers, and files that are refused."""
import os
import pickle

import pytest
import torch
from conftest import random_model
from safetensors.torch import save_file

import download
from architectures.dit import convert_diffusers
from cards import DiT_models, ModelCard
from download import find_state_dict, load_decoder, load_model
from errors import UserError
from files.weights import read_state_dict

CARD = ModelCard(2, 64, 4, 2, num_classes=10, image_sizes=(64,))
CPU = torch.device("cpu")


def as_it_is(state):
    return state


def as_training_leaves_it(state):
    return {"ema": state, "model": {}, "opt": {"lr": 1e-4}}


@pytest.mark.parametrize("wrap", [as_it_is, as_training_leaves_it])
@pytest.mark.parametrize("half", [False, True])
def test_published_files_load(tmp_path, wrap, half):
    state = random_model().state_dict()
    stored = {key: value.half() for key, value in state.items()} if half else state
    torch.save(wrap(stored), tmp_path / "model.pt")
    model = load_model("Small", CARD, 64, 10, str(tmp_path / "model.pt"), CPU)
    for key, value in model.state_dict().items():
        assert torch.allclose(value, state[key], atol=1e-3 if half else 0)
    assert not model.training and next(model.parameters()).dtype == torch.float32


def test_diffusers_folders_load(tmp_path):
    from test_models import diffusers_twin
    theirs = diffusers_twin(0.0)
    theirs.save_pretrained(tmp_path / "hub" / "transformer")
    model = load_model("Small", CARD, 64, 10, str(tmp_path / "hub"), CPU)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 10])
    assert torch.allclose(model(x, t, y), theirs(x, timestep=t, class_labels=y).sample, atol=1e-4)
    assert "pos_embed" not in convert_diffusers(theirs.state_dict())


def test_code_in_a_pickle_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save({"ema": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(UserError, match="not a file of plain tensors"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_truncated_files_are_refused(tmp_path, name):
    state = random_model().state_dict()
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated"):
        read_state_dict(path)


def test_weights_of_another_model_are_refused(tmp_path):
    for model, message in (
        (random_model(depth=3), "unexpected 'blocks.2"),
        (random_model(depth=1), "lacks 'blocks.1"),
        (random_model(hidden_size=32), "expected \\("),
        (random_model(num_classes=7), "embedding_table"),
    ):
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_model("Small", CARD, 64, 10, str(tmp_path / "model.safetensors"), CPU)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no weights"):
        read_state_dict(tmp_path / "list.pt")
    with pytest.raises(UserError, match="do not exist"):
        read_state_dict(tmp_path / "nothing.pt")


def test_published_weights_are_fetched_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert download.PUBLISHED_URL == "https://dl.fbaipublicfiles.com/DiT/models/"
    server, state = tmp_path / "server", random_model().state_dict()
    server.mkdir()
    torch.save(state, server / "DiT-XL-2-512x512.pt")
    monkeypatch.setattr(download, "PUBLISHED_URL", server.as_uri() + "/")
    for _ in range(2):
        source, found = find_state_dict("DiT-XL/2", DiT_models["DiT-XL/2"], 512, None)
        assert found.keys() == state.keys() and source == "pretrained_models/DiT-XL-2-512x512.pt"
        # The second time the server is gone.
        (server / "DiT-XL-2-512x512.pt").unlink(missing_ok=True)


def test_a_download_of_other_bytes_is_not_kept(tmp_path):
    (tmp_path / "there").write_bytes(b"something else")
    message = "put the file at .*here' by hand, or give one with --flag"
    with pytest.raises(UserError, match=message):
        download.fetch((tmp_path / "there").as_uri(), tmp_path / "here", "--flag", "6726825d")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_failed_download_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def offline(url, path, **_):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    message = "put the file at 'pretrained_models/DiT-XL-2-256x256.pt' by hand"
    with pytest.raises(UserError, match=message):
        find_state_dict("DiT-XL/2", DiT_models["DiT-XL/2"], 256, None)
    with pytest.raises(UserError, match="give a file with --ckpt"):
        find_state_dict("DiT-B/4", DiT_models["DiT-B/4"], 256, None)
    from diffusers.models import AutoencoderKL
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda source: offline(source, None))
    with pytest.raises(UserError, match="into 'pretrained_models/sd-vae-ft-mse' by hand"):
        load_decoder(DiT_models["DiT-XL/2"], "mse", CPU)


def tiny_vae():
    from diffusers.models import AutoencoderKL
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)
    return model.eval()


def test_the_vae_gets_unscaled_latents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = tiny_vae()
    vae.save_pretrained(download.FOLDER / "sd-vae-ft-ema")
    latents = torch.randn(1, 4, 4, 4)
    images = load_decoder(DiT_models["DiT-XL/2"], "ema", CPU)(latents)
    assert images.shape == (1, 3, 32, 32)
    assert torch.allclose(images, vae.decode(latents / 0.18215).sample, atol=1e-5)
