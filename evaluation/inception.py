"""The Inception network of FID (weights of 2015-12-05), with ADM's choice of layers.

torch-fidelity's conversion reproduces the TensorFlow graph, its resizing included. FID uses
pool 3. sFID uses the first seven channels of the first convolution of the block called ``mixed_6``
in the graph, after its ReLU.
"""
import io

import torch
from torch import Tensor

from evaluation.features import Extractor

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WIDTHS = (2048, 7 * 17 * 17, 1008)
SPATIAL_CHANNELS = 7


def build_network(state: dict[str, Tensor]) -> torch.nn.Module:
    """Build torch-fidelity's network with these weights.

    Its constructor unpickles what it is given: here a buffer that this function just wrote.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer)


def inception_extractor(network: torch.nn.Module, device: torch.device) -> Extractor:
    """Wrap the network: uint8 images (B, 3, H, W) of any size to ADM's features.

    These are (B, 2048), (B, 2023) and (B, 1008).
    """
    network = network.to(device)
    hooked = {}

    def keep_output(_module, _inputs, output: Tensor) -> None:
        hooked["spatial"] = output

    network.Mixed_6d.branch1x1.register_forward_hook(keep_output)

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pool, logits = network(images)
        maps = hooked.pop("spatial")[:, :SPATIAL_CHANNELS]  # (B, 7, 17, 17)
        # Flattened as TensorFlow does: height, width, channel.
        spatial = maps.permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
        return pool, spatial, logits

    return Extractor(f"inception-{SHA256[:8]}", WIDTHS, run, device)
