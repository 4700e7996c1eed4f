"""Q-DiT's figures of what makes diffusion transformers hard to quantise, from plain arrays."""
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from report.canvas import draw_surface, png
from report.places import Place, by_role

MOST_BOXES = 50
LEAST_QUARTILE = 1e-3  # of the linear part of a box plot's axis
PANELS = 2  # side by side


def weights_and_inputs(name: str, weight: NDArray, inputs: NDArray) -> bytes:
    """Draw the magnitudes of a layer's weight (O, I) beside those of its input (T, I).

    As in figure 2 of Q-DiT.
    """
    canvas = Canvas(figsize=(11, 4.6), layout="constrained")
    left = canvas.add_subplot(1, 2, 1, projection="3d")
    draw_surface(left, weight, f"{name}, weight", "output channel")
    right = canvas.add_subplot(1, 2, 2, projection="3d")
    draw_surface(right, inputs, f"{name}, input")
    return png(canvas)


def boxes(title: str, label: str, quantiles: NDArray) -> bytes:
    """Draw a box for every row of ``quantiles`` (K, 7), such as a step.

    Box and line are the quartiles, whiskers the first and last hundredth, dots the extremes. The
    axis is linear as far as the quartiles reach, logarithmic beyond. Of more than ``MOST_BOXES``
    rows some are drawn, evenly spread.

    Args:
        label: what the rows are.
    """
    spread = np.linspace(0, len(quantiles) - 1, min(MOST_BOXES, len(quantiles)))
    rows = np.unique(spread.round().astype(int))
    canvas = Canvas(figsize=(11, 4.2), layout="constrained")
    axes = canvas.subplots()
    axes.bxp(
        [_box(quantiles[row]) for row in rows],
        positions=rows, widths=0.6 * len(quantiles) / len(rows), manage_ticks=False,
        medianprops={"color": "tab:orange", "linewidth": 2},
        flierprops={"marker": ".", "markersize": 3})
    quartiles = np.abs(quantiles[:, [2, 4]]).max()
    axes.set_yscale("symlog", linthresh=max(quartiles, LEAST_QUARTILE))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel=label, ylabel="activation (linear in the middle)")
    axes.grid(alpha=0.3, axis="y")
    return png(canvas)


def _box(quantiles: NDArray) -> dict[str, float | list[float]]:
    """Put seven quantiles in matplotlib's words."""
    least, low, first, median, third, high, largest = map(float, quantiles)
    return {
        "whislo": low, "q1": first, "med": median, "q3": third, "whishi": high,
        "fliers": [least, largest],
    }


def deviations_over_steps(
    deviations: dict[str, NDArray],  # per layer, (steps,) of one image
    places: Mapping[str, Place],
) -> bytes:
    """Draw the standard deviation of every layer's input over steps.

    A panel per role has a line per block. As in figure 4 of Q-DiT.
    """
    canvas, panels = _panels(deviations, places)
    for axes, (role, lines) in panels:
        colors = colormaps["viridis"](np.linspace(0, 1, len(lines)))
        for (block, values), color in zip(lines.items(), colors):
            axes.plot(values, color=color, label=block)
        axes.set(title=role, xlabel="step (0 is the noisiest)", ylabel="standard deviation")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside right upper", fontsize=7)
    return png(canvas)


def deviations_over_images(
    deviations: dict[str, NDArray],  # per layer, (N,) at one step
    places: Mapping[str, Place],
) -> bytes:
    """Draw the standard deviation of every image in every layer's input, at one step.

    A panel per role has a column of dots per block.
    """
    canvas, panels = _panels(deviations, places)
    for axes, (role, columns) in panels:
        table = np.stack(list(columns.values()))  # (blocks, N)
        axes.plot(table, "o", markersize=4, alpha=0.6)
        axes.plot(table.mean(1), "_", color="black", markersize=12)
        axes.set(title=role, xlabel="block", ylabel="standard deviation")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return png(canvas)


def _panels(
    values: dict[str, NDArray], places: Mapping[str, Place]
) -> tuple[Canvas, list[tuple[Axes, tuple[str, dict[str, NDArray]]]]]:
    """Make a canvas with a panel for the values of every role, block by block."""
    roles = by_role(values, places)
    lines = -(-len(roles) // PANELS)
    canvas = Canvas(figsize=(11, 0.4 + 3.1 * lines), layout="constrained")
    axes = canvas.subplots(lines, PANELS, squeeze=False).ravel()
    for unused in axes[len(roles):]:
        unused.remove()
    return canvas, list(zip(axes, roles.items()))
