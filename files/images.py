"""Images: bytes and grids."""
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (N, 1 or 3, H, W) around [-1, 1] to uint8 (N, H, W, 3): ``trunc(clamp(127.5 v + 128, 0, 255))``, grey repeated.

    Raises:
        ValueError: a value is not finite.
    """
    if not torch.isfinite(images).all():
        raise ValueError("the model produced NaN or infinity")
    images = images.expand(-1, 3, -1, -1)
    return (127.5 * images + 128.0).clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def grid(images: np.ndarray, columns: int, cell: int = 64) -> Image.Image:
    """uint8 (N, H, W, 3) in rows of ``columns``; small images are enlarged to about ``cell`` pixels without smoothing."""
    zoom = max(1, cell // images.shape[1])
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    tiles = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Image.fromarray(make_grid(tiles, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy())


def side_by_side(pictures: list[Image.Image], titles: list[str], gap: int = 16, band: int = 20) -> Image.Image:
    """Pictures of one height in a row, each under its title."""
    from PIL import ImageDraw, ImageFont
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, pictures[0].height + band), "white")
    draw, x = ImageDraw.Draw(canvas), 0
    for picture, title in zip(pictures, titles):
        canvas.paste(picture, (x, band))
        draw.text((x + picture.width / 2, band / 2), title, fill="black", anchor="mm", font=ImageFont.load_default(size=14))
        x += picture.width + gap
    return canvas
