"""The figures of one run of QuantDiT.py."""
import io

from PIL import Image

from config import Recipe
from quant.pipeline import Result
from report import figures
from report.layers import IMAGES, Observed
from report.page import Figure


def quantisation_figures(observed: Observed, recipe: Recipe, result: Result, pair: Image.Image) -> list[Figure]:
    """Figures of a quantised model; ``pair``: the same seeds from the float and the quantised model."""
    buffer = io.BytesIO()
    pair.save(buffer, format="PNG")
    made = [Figure("images", buffer.getvalue(), "The same seeds from the float model and from the quantised one."),
            Figure("layer-errors", figures.layer_errors(observed.error_db),
                   f"Signal to noise ratio of every quantised layer's output, given the float model's inputs at steps "
                   f"{', '.join(map(str, observed.watched))} of {observed.steps} (up to {IMAGES} images, with and without label).")]
    if result.losses:
        losses = {name: values.cpu().numpy() for name, values in result.losses.items()}
        made.append(Figure("alpha-losses", figures.alpha_losses(losses, recipe.alphas, result.alphas),
                           "Grid search: each candidate's loss over the calibration trajectory, relative to the layer's best."))
    for name, before in observed.inputs.items():
        smooth = result.layers[name].smooth
        after = before if smooth is None else before / smooth.cpu()
        note = "This recipe does not smooth, so both sides are the same." if smooth is None else "The right side is divided by the smoothing factors."
        made.append(Figure(f"channel-magnitude-{name}", figures.channel_magnitude(name, before.numpy(), after.numpy()),
                           f"Magnitude of the input of {name} over tokens and channels, one image at step {observed.steps // 2}. {note}"))
        made.append(Figure(f"channel-maxima-{name}", figures.channel_maxima(name, observed.absmax[name].numpy()),
                           f"Largest magnitude of each input channel of {name} at each step of sampling."))
    return made
