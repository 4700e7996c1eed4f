"""FVD: what a network is given, the distance in closed form, evaluate.py --fvd and the judge."""
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import bundled_digits, call, error_line
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, resize

import config
import evaluate
import QuantDiT
from cards import DiT_models
from diffusion import ddpm_step, make_schedule
from diffusion.generate import Sampling, generate_latents
from errors import UserError
from evaluation.metrics import statistics
from evaluation.networks import load_video_reference
from evaluation.video import (
    VideoSet,
    fvd,
    load_video_extractor,
    load_video_set,
    prepare,
    video_features,
)
from evaluation.video_judge import fvd_judge
from examples.digits.classifier import load_classifier
from examples.digits.data import decode, load_images
from examples.digits.videos import digits_video_extractor, sample_videos, write_video_reference
from files.images import to_bytes

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Colours(nn.Module):
    """Averages of every colour, over and over: linear, so that a closed form is known."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3, 4]).repeat(1, 134)[:, :400]


class Usual(nn.Module):
    """Has the usual file's options, and tells which it was called with."""

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        options = torch.tensor([float(rescale), float(resize), float(return_features)])
        shape = torch.tensor([float(size) for size in x.shape[1:]])
        extremes = torch.stack([x.min(), x.max()])
        first = torch.cat([options, shape, extremes])
        return torch.cat([first, torch.zeros(2048 - len(first))]).repeat(len(x), 1)


class Single(nn.Module):
    """Gives one number for a batch, which are no features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class Images(nn.Module):
    """Takes images, not videos."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def saved(network: nn.Module, name: str = "network.pt") -> str:
    torch.jit.script(network).save(name)
    return name


def random_videos(seed: int, count: int = 4, frames: int = 16, size: int = 20) -> np.ndarray:
    shape = (count, frames, size, size, 3)
    return np.random.default_rng(seed).integers(60, 190, shape, dtype=np.uint8)


def as_set(features: np.ndarray) -> VideoSet:
    return VideoSet(len(features), statistics(features))


def features_of(videos: np.ndarray, network: nn.Module, batch: int = 5) -> np.ndarray:
    return video_features(videos, load_video_extractor("none", saved(network), CPU), batch, "test")


def test_brightness_adds_its_square_for_each_feature():
    videos = random_videos(0)
    shift = 25
    before = features_of(videos, Colours())
    after = features_of(videos + np.uint8(shift), Colours())
    expected = 400 * (shift / 127.5) ** 2
    assert fvd(as_set(before), as_set(after)) == pytest.approx(expected, rel=1e-4)
    assert fvd(as_set(before), as_set(before)) == pytest.approx(0, abs=1e-6)


def test_features_are_averages_of_the_first_16_frames_whatever_the_batch():
    videos = random_videos(1, frames=19, size=224)
    expected = videos[:, :16].mean((1, 2, 3)) / 127.5 - 1
    for batch in (1, 3):
        features = features_of(videos, Colours(), batch)
        assert features.shape == (4, 400)
        assert np.allclose(features[:, :3], expected, atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (20, 20), (256, 256), (90, 160), (301, 210)])
def test_frames_are_resized_as_torchvision_does(size):
    generator = torch.Generator().manual_seed(0)
    videos = torch.randint(0, 256, (2, 3, 3, *size), generator=generator, dtype=torch.uint8)
    prepared = prepare(videos)
    assert prepared.shape == (2, 3, 3, 224, 224)
    for video, result in zip(videos, prepared.transpose(1, 2)):
        height, width = (-(-224 * side // min(size)) for side in size)
        frames = center_crop(resize(video.float(), [height, width], antialias=False), [224, 224])
        shown = (frames / 127.5 - 1)
        # Where an odd number of pixels is cut, torchvision rounds the other way.
        if (height - 224) % 2 == 0 and (width - 224) % 2 == 0:
            assert torch.allclose(result, shown, atol=1e-4)
    assert prepared.min() >= -1.0001 and prepared.max() <= 1.0001


def test_the_usual_file_is_told_that_the_input_is_ready():
    videos = random_videos(2, count=3)
    videos[0, 0, 0, 0, 0], videos[0, 0, 0, 0, 1] = 0, 255
    first = features_of(videos, Usual())[0]
    assert len(first) == 2048
    # Neither rescaled nor resized again, features wanted; (3, 16, 224, 224) in [-1, 1].
    assert first[:7].tolist() == [0, 0, 1, 3, 16, 224, 224]
    assert first[7:9] == pytest.approx([-1, 1], abs=1e-5)


@pytest.mark.parametrize("network, message", [
    (Single(), r"features of shape \(\): expected \(B, 400\) or \(B, 2048\)"),
    (Images(), r"does not take \(B, 3, 16, 224, 224\)"),
])
def test_a_network_of_another_kind_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        features_of(random_videos(3, count=2), network)


def test_the_distance_is_scipys():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))
    b = 1.3 * rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12)) + 0.2
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum()
    expected += np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert fvd(as_set(a), as_set(b)) == pytest.approx(expected, rel=1e-8)


def digit_videos(shuffle: bool = False) -> np.ndarray:
    with np.load(write_video_reference(Path("digits.npz"))) as file:
        videos = file["arr_0"]
    if shuffle:
        rng = np.random.default_rng(0)
        videos = np.stack([video[rng.permutation(16)] for video in videos])
    return videos


def test_reference_videos_are_real_digits_that_count_up():
    videos = digit_videos()
    assert videos.shape == (100, 16, 16, 16, 3) and videos.dtype == np.uint8
    frames = videos.reshape(-1, 16, 16, 3)
    images, labels = load_images()
    known = {image.tobytes(): int(label) for image, label in zip(to_bytes(images), labels)}
    assert [known[frame.tobytes()] for frame in frames] == [i % 10 for i in range(1600)]


def test_the_stand_in_sees_frames_by_the_classifier_and_their_order():
    videos = digit_videos()[:20]
    extractor = digits_video_extractor(CPU)
    features = video_features(videos, extractor, 7, "test")
    classifier = load_classifier()
    for video, row in zip(videos, features):
        pixels = torch.tensor(video[:, None, :, :, 0] / 127.5 - 1, dtype=torch.float32)
        seen = classifier.features(pixels).numpy()
        assert np.allclose(row[:64], seen.mean(0), atol=1e-4)
        assert np.allclose(row[64:], np.abs(np.diff(seen, axis=0)).mean(0), atol=1e-4)

    # The same frames in another order: averages stay, changes do not.
    shuffled = video_features(digit_videos(shuffle=True)[:20], extractor, 7, "test")
    assert np.allclose(shuffled[:, :64], features[:, :64], atol=1e-4)
    assert fvd(as_set(features), as_set(shuffled)) > 10 * fvd(
        as_set(features[:, :64]), as_set(shuffled[:, :64])) + 1


def table(capsys, *argv) -> list[list[str]]:
    call(evaluate, *argv)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in rows[0].strip("|").split("|")] == ["samples", "N", "FVD"]
    assert "fewer videos than the" in printed
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_evaluate_prints_the_distance_of_every_file(capsys):
    real, made = digit_videos(), digit_videos(shuffle=True)[:60]
    np.savez("made.npz", arr_0=made)
    flags = ("digits.npz", "made.npz", "digits.npz", "--fvd", "--features", "digits")
    extractor = digits_video_extractor(CPU)
    expected = fvd(*(as_set(video_features(videos, extractor, 4, "")) for videos in (real, made)))
    rows = table(capsys, *flags)
    assert [row[:2] for row in rows] == [["made.npz", "60"], ["digits.npz", "100"]]
    assert float(rows[0][2]) == pytest.approx(expected, rel=1e-3)
    assert float(rows[1][2]) == pytest.approx(0, abs=1e-3)

    call(evaluate, *flags, "--json", "--batch-size", "16")
    entries = json.loads(capsys.readouterr().out)
    assert entries[0]["features"] == "digits-video" and entries[0]["n"] == 60
    assert entries[0]["fvd"] == pytest.approx(expected, rel=1e-3)


def test_evaluate_takes_a_network_from_a_file(capsys):
    np.savez("real.npz", arr_0=random_videos(0))
    np.savez("made.npz", arr_0=random_videos(0) + np.uint8(10))
    rows = table(capsys, "real.npz", "made.npz", "--fvd", "--i3d", saved(Colours()))
    assert float(rows[0][2]) == pytest.approx(400 * (10 / 127.5) ** 2, rel=1e-3)


def refused(capsys, *argv) -> str:
    """Run a wrong command line; returns its one line, the progress of features aside."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(evaluate, *argv)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "features of" not in line and line]
    assert (caught.value.code, printed.out, len(lines)) == (2, "", 1), printed.err
    return lines[0]


@pytest.mark.parametrize("flags, message", [
    (["--fvd"], "FVD needs a video network: give --i3d FILE"),
    (["--fvd", "--i3d", "none.pt"], "'none.pt' does not exist"),
    (["--fvd", "--i3d", "real.npz"], "'real.npz' is no TorchScript file"),
    (["--i3d", "network.pt"], "--i3d is the network of --fvd"),
    (["--fvd", "--features", "digits", "--cache"], "--cache is for images"),
    (["--fvd", "--features", "digits", "--pr-dtype", "float16"], "--pr-dtype float16 is for"),
    (["--fvd", "--features", "digits", "--inception", "x"], "--inception is for images"),
    (["--fvd", "--features", "digits"], "20x20 pixels: features digits-video need 16x16"),
])
def test_evaluate_refuses(capsys, flags, message):
    np.savez("real.npz", arr_0=random_videos(0))
    assert message in refused(capsys, "real.npz", "real.npz", *flags)


@pytest.mark.parametrize("arrays, message", [
    ({"arr_0": random_videos(0)[:, 0]}, "expected uint8 videos (N, F, H, W, 3), at least one"),
    ({"arr_0": random_videos(0).astype(np.float32)}, "is float32"),
    ({"arr_0": random_videos(0, frames=15)}, "videos of 15 frames are too short"),
    ({"arr_0": random_videos(0, count=1)}, "1 video is too few: expected at least 2"),
    ({"videos": random_videos(0)}, "holds no 'arr_0'"),
])
def test_files_without_videos_are_refused(capsys, arrays, message):
    np.savez("real.npz", arr_0=random_videos(0))
    np.savez("bad.npz", **arrays)
    line = refused(capsys, "real.npz", "bad.npz", "--fvd", "--i3d", saved(Colours()))
    assert message in line and "'bad.npz'" in line


def test_the_judge_is_the_distance_of_the_models_videos(monkeypatch):
    monkeypatch.setattr(config, "judge_fvd_videos", 4)
    model, schedule = bundled_digits(depth=2), make_schedule("2")
    extractor = digits_video_extractor(CPU)
    reference = load_video_reference(DiT_models["DiT-Digits"], None, Path())
    assert reference == Path("digits-videos.npz") and reference.is_file()

    def sample(sampled, videos):
        return sample_videos(sampled, videos, decode, Sampling(schedule, 0, cfg_scale=1.5))

    judge = fvd_judge(sample, extractor, reference, "2 steps, seed 0")
    assert judge.description == (
        "FVD of 4 videos to digits-videos.npz, features digits-video, 2 steps, seed 0")

    labels = torch.arange(64) % 10
    latents = generate_latents(model, schedule, range(64), labels, 0, 1.5, ddpm_step)
    images = to_bytes(decode(latents)).reshape(4, 16, 16, 16, 3)
    made = as_set(video_features(images, extractor, 3, ""))
    expected = fvd(load_video_set(reference, extractor, 3), made)
    assert judge.loss(model) == pytest.approx(expected, rel=1e-3)


def test_group_sizes_can_be_chosen_by_the_judge(capsys, monkeypatch):
    monkeypatch.setattr(config, "judge_fvd_videos", 3)
    call(QuantDiT, "--model", "DiT-Digits", "--recipe", "qdit", "--judge", "fvd",
         "--weight", "nearest", "--population", "2", "--generations", "1",
         "--num-sampling-steps", "2", "--class-labels", "0,1", "--output", "model")
    assert "wrote model.safetensors" in capsys.readouterr().out
    assert Path("digits-videos.npz").is_file()


def test_models_of_large_images_have_no_videos(capsys):
    line = error_line(capsys, lambda: call(
        QuantDiT, "--model", "DiT-XL/2", "--recipe", "qdit", "--judge", "fvd"))
    assert "--judge fvd looks at videos, and DiT-XL/2 makes images" in line
    with pytest.raises(UserError, match="--reference is missing"):
        load_video_reference(DiT_models["DiT-XL/2"], None, Path())
