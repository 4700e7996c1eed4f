"""The networks that judge images, and the real images they compare with."""
import warnings
from pathlib import Path

import torch
from torch import Tensor

from download import FOLDER, fetch
from errors import UserError
from evaluation.features import Extractor
from evaluation.fidelity import Perceptual
from files.digests import sha256
from files.weights import read_state_dict
from models import ModelCard

FEATURES = ("inception", "digits")


def load_extractor(kind: str, weights: str | None, device: torch.device) -> Extractor:
    """The network that judges images: a value of ``FEATURES``; ``weights`` overrides the fetched file of ``inception``.

    Raises:
        UserError: its weights cannot be had, or are not the published ones.
    """
    if kind == "digits":
        from examples.digits.classifier import digits_extractor
        return digits_extractor(device)
    from evaluation.inception import SHA256, URL, build_network, inception_extractor
    path = Path(weights) if weights is not None else FOLDER / URL.rsplit("/", 1)[1]
    if weights is None and not path.exists():
        fetch(URL, path, "--inception", SHA256)
    if not path.is_file():
        raise UserError(f"Inception weights '{path}' do not exist: give {URL.rsplit('/', 1)[1]} (from {URL})")
    found = sha256(path)
    if found != SHA256:
        raise UserError(f"'{path}' has SHA-256 {found[:16]}…, expected {SHA256[:16]}…: give {URL.rsplit('/', 1)[1]} (from {URL})")
    return inception_extractor(build_network(read_state_dict(path)), device)


def load_reference(card: ModelCard, given: str | None, folder: Path) -> Path:
    """The ``.npz`` of real images that samples of a model are compared with: the one given, or the bundled model's data.

    Raises:
        UserError: none was given and none is bundled.
    """
    if given is not None:
        return Path(given)
    if card.features == "digits":
        from examples.digits.data import write_reference
        path = folder / "digits-reference.npz"
        return path if path.exists() else write_reference(path)
    raise UserError("--reference is missing: give ADM's file of real images and their statistics, for 256 pixels "
                    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz")


ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def load_lpips(device: torch.device) -> Perceptual:
    """LPIPS (Zhang et al., 2018) with AlexNet; the calibrated linear layers come with the package, the trunk is fetched.

    Raises:
        UserError: the trunk's weights cannot be had, or are not the published ones.
    """
    path = FOLDER / ALEXNET_URL.rsplit("/", 1)[1]
    if not path.exists():
        fetch(ALEXNET_URL, path, sha256_prefix=path.stem.rsplit("-", 1)[1])
    if not sha256(path).startswith(path.stem.rsplit("-", 1)[1]):
        raise UserError(f"'{path}' is not the published file (its SHA-256 does not begin as its name ends): delete it")
    model = build_lpips(read_state_dict(path)).to(device)
    return lambda a, b: model(a.to(device), b.to(device))


def build_lpips(trunk: dict[str, Tensor]) -> torch.nn.Module:
    """LPIPS on torchvision's AlexNet weights: images (N, 3, H, W) in [-1, 1], twice, to distances."""
    from lpips import LPIPS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision the old way
        model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    model.net.load_state_dict({key: trunk[f"features.{key.split('.', 1)[1]}"] for key in model.net.state_dict()})  # slice1.0.weight
    return model.eval()
