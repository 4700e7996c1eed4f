"""The figures of one run of QuantDiT.py."""
import io

from PIL import Image
from torch import Tensor

from config import Recipe
from quant.layers.quantised import QuantizedLayer
from quant.pipeline import Result
from report import figures
from report.layers import IMAGES, Observed
from report.page import Figure


def quantisation_figures(
    observed: Observed,
    recipe: Recipe,
    result: Result,
    pair: Image.Image,
) -> list[Figure]:
    """Draw the figures of a quantised model.

    Args:
        pair: the same seeds from the float and the quantised model.
    """
    drawn = [_images(pair), _layer_errors(observed)]
    if result.losses:
        drawn.append(_alpha_losses(recipe, result))
    for name, magnitudes in observed.inputs.items():
        drawn.append(_channel_magnitude(name, magnitudes, result.layers[name], observed))
        drawn.append(Figure(
            f"channel-maxima-{name}",
            figures.channel_maxima(name, observed.absmax[name].numpy()),
            f"Largest magnitude of each input channel of {name} at each step of sampling."))
    return drawn


def _images(pair: Image.Image) -> Figure:
    """Show the pictures as they are."""
    buffer = io.BytesIO()
    pair.save(buffer, format="PNG")
    caption = "The same seeds from the float model and from the quantised one."
    return Figure("images", buffer.getvalue(), caption)


def _layer_errors(observed: Observed) -> Figure:
    """Draw the error of every layer's output."""
    watched = ", ".join(map(str, observed.watched))
    caption = (
        "Signal to noise ratio of every quantised layer's output, given the float model's inputs "
        f"at steps {watched} of {observed.steps} "
        f"(up to {IMAGES} images, with and without label).")
    png = figures.layer_errors(observed.error_db, observed.places)
    return Figure("layer-errors", png, caption)


def _alpha_losses(recipe: Recipe, result: Result) -> Figure:
    """Draw what the grid search compared."""
    losses = {name: values.cpu().numpy() for name, values in result.losses.items()}
    caption = (
        "Grid search: each candidate's loss over the calibration trajectory, "
        "relative to the layer's best.")
    png = figures.alpha_losses(losses, recipe.alphas, result.alphas)
    return Figure("alpha-losses", png, caption)


def _channel_magnitude(
    name: str,
    before: Tensor,  # (T, I), of the layer's input
    layer: QuantizedLayer,
    observed: Observed,
) -> Figure:
    """Draw one layer's input before and after smoothing."""
    if layer.smoothing.factors is None:
        after = before
        note = "This recipe does not smooth, so both sides are the same."
    else:
        after = before / layer.smoothing.factors.cpu()
        note = "The right side is divided by the smoothing factors."
    caption = (
        f"Magnitude of the input of {name} over tokens and channels, "
        f"one image at step {observed.steps // 2}. {note}")
    png = figures.channel_magnitude(name, before.numpy(), after.numpy())
    return Figure(f"channel-magnitude-{name}", png, caption)
