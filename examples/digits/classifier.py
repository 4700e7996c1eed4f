"""A small CNN that reads the digits: the judge of generated images."""
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evaluation.features import Extractor

WEIGHTS = Path(__file__).with_name("classifier.safetensors")


class DigitClassifier(nn.Module):
    """Images (N, 1, 16, 16) in [-1, 1] to logits (N, 10)."""

    def __init__(self):
        super().__init__()
        self.spatial = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )  # (N, 64, 4, 4)
        self.pooled = nn.Sequential(nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the values before the last linear layer."""
        return self.pooled(self.spatial(images))  # (N, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))  # (N, 10)


def load_classifier() -> DigitClassifier:
    """Load the bundled classifier, in eval mode and float32 (stored as float16)."""
    model = DigitClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model.eval()


def digits_extractor(device: torch.device) -> Extractor:
    """Put the classifier in the place of Inception, on uint8 images (B, 3, 16, 16).

    FID, precision and recall use the 64 values before the last linear layer. sFID uses the first 7
    of 64 channels of the last 4x4 feature map, flattened height, width, channel (112). The
    Inception Score uses the ten logits without bias.
    """
    model = load_classifier().to(device)

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grey = (images[:, :1].float() - 127.5) / 127.5
        maps = model.spatial(grey)  # (B, 64, 4, 4)
        pool = model.pooled(maps)  # (B, 64)
        spatial = maps[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 112)
        return pool, spatial, pool @ model.head.weight.T

    return Extractor("digits", (64, 7 * 4 * 4, 10), run, device, side=16)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift images (N, 1, H, W) together by up to one pixel, and add noise.

    Otherwise the classifier would learn exact pixels.
    """
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
    shifted = padded[:, :, dy:dy + height, dx:dx + width]
    return shifted + 0.1 * torch.randn(images.shape, generator=generator)
