"""The figures of one run of QuantDiT.py."""
import io

from PIL import Image
from torch import Tensor

from config import Recipe
from quant.layers.quantised import QuantizedLayer
from quant.pipeline import Result
from report import distributions, figures
from report.layers import IMAGES, Observed, ShownLayer
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
    for name, shown in observed.shown.items():
        drawn.append(_channel_magnitude(name, shown.inputs, result.layers[name], observed))
        drawn.append(Figure(
            f"channel-maxima-{name}",
            figures.channel_maxima(name, observed.absmax[name].numpy()),
            f"Largest magnitude of each input channel of {name} at each step of sampling."))
        drawn += _layer_observations(name, shown, observed)
    return drawn + _deviations(observed)


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
        f"one image at step {observed.middle}. {note}")
    png = figures.channel_magnitude(name, before.numpy(), after.numpy())
    return Figure(f"channel-magnitude-{name}", png, caption)


def _layer_observations(name: str, shown: ShownLayer, observed: Observed) -> list[Figure]:
    """Draw how weight and input of one layer are distributed, as Q-DiT does."""
    surfaces = distributions.weights_and_inputs(name, shown.weight.numpy(), shown.inputs.numpy())
    steps = distributions.boxes(
        f"input of {name}, one image", "step (0 is the noisiest)", shown.step_quantiles.numpy())
    images = distributions.boxes(
        f"input of {name}, step {observed.middle}", "image", shown.image_quantiles.numpy())
    box = "Boxes are quartiles, whiskers the first and last hundredth, dots the extremes."
    return [
        Figure(
            f"weight-magnitude-{name}", surfaces,
            f"Magnitudes of weight and input of {name} over channels, one image at step "
            f"{observed.middle} (as figure 2 of Q-DiT)."),
        Figure(
            f"input-over-steps-{name}", steps,
            f"Values of the input of {name} at each step, one image (as figure 3 of Q-DiT). {box}"),
        Figure(
            f"input-over-images-{name}", images,
            f"Values of the input of {name} in each image, with label and then without, at step "
            f"{observed.middle}. {box}"),
    ]


def _deviations(observed: Observed) -> list[Figure]:
    """Draw the standard deviation of every layer's input, over steps and over images."""
    first = {name: values[:, 0].numpy() for name, values in observed.deviations.items()}
    middle = {
        name: values[observed.middle].numpy() for name, values in observed.deviations.items()}
    return [
        Figure(
            "deviation-over-steps",
            distributions.deviations_over_steps(first, observed.places),
            "Standard deviation of each layer's input over steps, one image, a line per block "
            "(as figure 4 of Q-DiT)."),
        Figure(
            "deviation-over-images",
            distributions.deviations_over_images(middle, observed.places),
            f"Standard deviation of each layer's input in each image at step {observed.middle}: "
            "a dot per image, with label and without; dashes are means."),
    ]
