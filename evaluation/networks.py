"""The networks that judge images, and the real images they compare with."""
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cards import ModelCard
from download import FOLDER, fetch
from errors import UserError
from evaluation.features import Extractor
from evaluation.fidelity import Perceptual
from examples.bundles import find_bundle, find_videos
from files.digests import sha256
from files.weights import read_state_dict

ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
IMAGENET_REFERENCE_URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz")


def load_extractor(kind: str, weights: str | None, device: torch.device) -> Extractor:
    """Load the network that judges images.

    Args:
        kind: one of ``FEATURES``.
        weights: used in place of the fetched file of ``inception``.

    Raises:
        UserError: its weights cannot be had, or are not the published ones.
    """
    return FEATURES[kind](weights, device)


def _inception(weights: str | None, device: torch.device) -> Extractor:
    """Load ADM's network from a file, which is fetched where none is given."""
    from evaluation.inception import SHA256, URL, build_network, inception_extractor
    file_name = _file_name(URL)
    advice = f"give {file_name} (from {URL})"
    path = Path(weights) if weights is not None else FOLDER / file_name
    if weights is None and not path.exists():
        fetch(URL, path, "--inception", SHA256)
    if not path.is_file():
        raise UserError(f"Inception weights '{path}' do not exist: {advice}")
    digest = sha256(path)
    if digest != SHA256:
        raise UserError(
            f"'{path}' has SHA-256 {digest[:16]}…, expected {SHA256[:16]}…: {advice}")
    return inception_extractor(build_network(read_state_dict(path)), device)


def _efficientnet(weights: str | None, device: torch.device) -> Extractor:
    from evaluation.efficientnet import load_efficientnet
    return load_efficientnet(device)


def _digits(weights: str | None, device: torch.device) -> Extractor:
    from examples.digits.classifier import digits_extractor
    return digits_extractor(device)


# The networks, and what loads each of them.
FEATURES: dict[str, Callable[[str | None, torch.device], Extractor]] = {
    "inception": _inception,
    "efficientnet": _efficientnet,
    "digits": _digits,
}


def load_reference(card: ModelCard, given: str | None, folder: Path) -> Path:
    """Choose the ``.npz`` of real images that samples of a model are compared with.

    It is the one ``given``, or the bundled model's data, which are written into ``folder``.

    Raises:
        UserError: none was given and none is bundled.
    """
    if given is not None:
        return Path(given)
    bundle = find_bundle(card.bundle)
    if bundle is not None:
        path = folder / f"{card.bundle}-reference.npz"
        return path if path.exists() else bundle.write_reference(path)
    raise UserError(
        "--reference is missing: give ADM's file of real images and their statistics, "
        f"for 256 pixels {IMAGENET_REFERENCE_URL}")


def load_video_reference(card: ModelCard, given: str | None, folder: Path) -> Path:
    """Choose the ``.npz`` of real videos that samples of a model are compared with.

    It is the one ``given``, or videos of the bundled model's data, written into ``folder``.

    Raises:
        UserError: none was given and none is bundled.
    """
    if given is not None:
        return Path(given)
    videos = find_videos(card.bundle)
    if videos is not None:
        path = folder / f"{card.bundle}-videos.npz"
        return path if path.exists() else videos.write_reference(path)
    raise UserError("--reference is missing: give an .npz of real videos, uint8 (N, F, H, W, 3)")


def load_lpips(device: torch.device) -> Perceptual:
    """Load LPIPS (Zhang et al., 2018) with AlexNet.

    The calibrated linear layers come with the package. The trunk (244 MB) is large for one number,
    so it is read where somebody put it, and never fetched.

    Raises:
        UserError: the trunk's weights are not there, or are not the published ones.
    """
    path = FOLDER / _file_name(ALEXNET_URL)
    if not path.exists():
        raise UserError(f"'{path}' is not there: download it from {ALEXNET_URL}")
    # torchvision's file names end as their SHA-256 begins.
    prefix = path.stem.rsplit("-", 1)[1]
    if not sha256(path).startswith(prefix):
        raise UserError(
            f"'{path}' is not the published file (its SHA-256 does not begin as its name ends): "
            "delete it")
    model = build_lpips(read_state_dict(path)).to(device)

    def distances(a: Tensor, b: Tensor) -> Tensor:
        return model(a.to(device), b.to(device))

    return distances


def build_lpips(trunk: dict[str, Tensor]) -> torch.nn.Module:
    """Build LPIPS on torchvision's AlexNet weights.

    It maps images (N, 3, H, W) in [-1, 1], twice, to distances.
    """
    from lpips import LPIPS
    with warnings.catch_warnings():
        # The package calls torchvision the old way.
        warnings.simplefilter("ignore")
        model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    renamed = {}
    for key in model.net.state_dict():
        # It calls "slice1.0.weight" what torchvision calls "features.0.weight".
        renamed[key] = trunk[f"features.{key.split('.', 1)[1]}"]
    model.net.load_state_dict(renamed)
    return model.eval()


def _file_name(url: str) -> str:
    """Return the last part of an address."""
    return url.rsplit("/", 1)[1]
