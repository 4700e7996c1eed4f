"""The models that the command line knows by name, and what it has to know of them."""
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModelCard:
    """What the command line has to know of a model: its shape, its classes, its images."""

    depth: int                               # blocks
    hidden_size: int                         # channels of a token
    num_heads: int                           # of attention
    patch_size: int                          # latent cells per token and side
    num_classes: int = 1000
    image_sizes: tuple[int, ...] = (256, 512)  # pixels per side; the first is the default
    downsample: int = 8                      # pixels per latent cell and side
    bundle: str = ""                         # its family in examples.bundles; empty: published
    features: str = "inception"              # judges the images: a key of evaluation.networks
    origin: str = ""                         # what a reader of its numbers has to know
    is_small: bool = False                   # it has short searches and few images by default


_SIZES = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
}
_DIGITS = ModelCard(
    depth=10,
    hidden_size=128,
    num_heads=4,
    patch_size=2,
    num_classes=10,
    image_sizes=(16,),
    downsample=2,
    bundle="digits",
    features="digits",
    is_small=True,
)
_EMOJI = ModelCard(
    depth=8,
    hidden_size=192,
    num_heads=6,
    patch_size=4,
    num_classes=31,
    image_sizes=(64,),
    downsample=4,
    bundle="emoji",
    features="efficientnet",
    is_small=True,
)

DiT_models: dict[str, ModelCard] = {
    **{
        f"DiT-{name}/{patch}": ModelCard(**size, patch_size=patch)
        for name, size in _SIZES.items()
        for patch in (2, 4, 8)
    },
    "DiT-Digits": _DIGITS,
    "DiT-Digits-Outliers": replace(
        _DIGITS,
        origin="Its activation outliers were put in by construction (examples/digits/outliers.py); "
               "the model it was made from has none.",
    ),
    "DiT-Emoji": _EMOJI,
    "DiT-Emoji-Outliers": replace(
        _EMOJI,
        origin="Its activation outliers were put in by construction (examples/emoji/outliers.py); "
               "docs/emoji.md says how many the model it was made from has by itself.",
    ),
}
