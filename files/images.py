"""Images as bytes, in grids and side by side."""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2  # white pixels between the images of a grid, and around them


def to_bytes(images: Tensor) -> np.ndarray:
    """Convert images (N, 1 or 3, H, W) around [-1, 1] to uint8 (N, H, W, 3), grey repeated.

    The formula is the published one, ``trunc(clamp(127.5 v + 128, 0, 255))``.

    Raises:
        ValueError: a value is not finite.
    """
    if not torch.isfinite(images).all():
        raise ValueError("the model produced NaN or infinity")
    images = images.expand(-1, 3, -1, -1)
    levels = (127.5 * images + 128.0).clamp(0, 255)
    return levels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def grid(images: np.ndarray, columns: int, cell: int = 64) -> Image.Image:
    """Arrange uint8 images (N, H, W, 3) in rows of ``columns``.

    Small images are enlarged to about ``cell`` pixels per side, without smoothing.
    """
    zoom = max(1, cell // images.shape[1])
    enlarged = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    _, height, width, _ = enlarged.shape
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    pitch = height + GAP, width + GAP
    canvas = np.full((rows * pitch[0] + GAP, columns * pitch[1] + GAP, 3), 255, np.uint8)
    for i, pixels in enumerate(enlarged):
        top, left = GAP + i // columns * pitch[0], GAP + i % columns * pitch[1]
        canvas[top:top + height, left:left + width] = pixels
    return Image.fromarray(canvas)


def side_by_side(
    pictures: list[Image.Image],
    titles: list[str],
    gap: int = 16,
    band: int = 20,
) -> Image.Image:
    """Paste pictures of one height in a row, each under its title.

    Args:
        gap: pixels between two pictures.
        band: pixels above them, for the titles.
    """
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, pictures[0].height + band), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    left = 0
    for picture, title in zip(pictures, titles):
        canvas.paste(picture, (left, band))
        middle = (left + picture.width / 2, band / 2)
        draw.text(middle, title, fill="black", anchor="mm", font=font)
        left += picture.width + gap
    return canvas
