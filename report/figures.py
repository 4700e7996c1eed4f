"""The figures of a report, each drawn from plain arrays, as PNG bytes."""
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from report.canvas import draw_surface, png
from report.places import Place, blocks_of, by_role

DARK = 0.6  # below this share of the color map, lettering has to be white


def channel_magnitude(name: str, before: NDArray, after: NDArray) -> bytes:
    """Draw the magnitude of one layer's input (T, I), before and after smoothing.

    As in figures 1 to 4 of the DiTAS paper's appendix.
    """
    canvas = Canvas(figsize=(11, 4.6), layout="constrained")
    left = canvas.add_subplot(1, 2, 1, projection="3d")
    draw_surface(left, before, f"{name}, before smoothing")
    right = canvas.add_subplot(1, 2, 2, projection="3d")
    draw_surface(right, after, f"{name}, after smoothing")
    return png(canvas)


def channel_maxima(name: str, absmax: NDArray) -> bytes:
    """Draw the largest magnitude of each input channel at each step, (steps, I), in log scale.

    Beside it stands the maximum over steps, which TAS uses.
    """
    canvas = Canvas(figsize=(11, 4.6), layout="constrained")
    left, right = canvas.subplots(1, 2, width_ratios=(3, 2))

    # Every step.
    logarithms = np.log10(absmax.clip(min=1e-4))
    image = left.imshow(logarithms, aspect="auto", cmap="viridis", interpolation="nearest")
    canvas.colorbar(image, ax=left, label="log10 of the maximum")
    left.set(title=name, xlabel="input channel", ylabel="step (0 is the noisiest)")

    # Their maximum, and three of them.
    over_steps = absmax.max(0)
    order = np.argsort(-over_steps)
    right.semilogy(over_steps[order], color="black", label="over all steps (TAS)")
    for step in sorted({0, len(absmax) // 2, len(absmax) - 1}):
        right.semilogy(absmax[step][order], linewidth=0.8, label=f"at step {step}")
    right.set(title="channel maxima, sorted", xlabel="rank of the channel")
    right.legend()
    return png(canvas)


def alpha_losses(
    losses: dict[str, NDArray],  # per layer, the loss of every candidate
    alphas: tuple[float, ...],
    chosen: dict[str, float],
) -> bytes:
    """Draw each candidate's loss over the layer's least, as a heat map; a dot is the one chosen.

    Rows are layers, columns are migration strengths.
    """
    table = np.stack([np.asarray(values) / np.min(values) for values in losses.values()])
    nearest = [
        int(np.argmin(np.abs(np.array(alphas) - chosen[name])))
        for name in losses
    ]
    canvas = Canvas(figsize=(9, 1.5 + 0.2 * len(table)), layout="constrained")
    axes = canvas.subplots()
    image = axes.imshow(np.log10(table), aspect="auto", cmap="magma", interpolation="nearest")
    canvas.colorbar(image, ax=axes, label="log10 (loss / least loss of the layer)")
    axes.plot(nearest, range(len(losses)), "o", color="cyan", markersize=4)
    axes.set_xticks(range(0, len(alphas), 2), [f"{alpha:.1f}" for alpha in alphas[::2]])
    axes.set_yticks(range(len(losses)), list(losses), fontsize=7)
    axes.set(xlabel="migration strength α", title="loss against α (dot: chosen)")
    return png(canvas)


def layer_errors(error_db: dict[str, float], places: Mapping[str, Place]) -> bytes:
    """Draw the SQNR of every layer's output over blocks, a line per role.

    Args:
        error_db: per layer, in dB.
        places: per layer, its role and block.
    """
    blocks = blocks_of(error_db, places)
    canvas = Canvas(figsize=(9, 4), layout="constrained")
    axes = canvas.subplots()
    for role, values in by_role(error_db, places).items():
        columns = [blocks.index(block) for block in values]
        axes.plot(columns, list(values.values()), "o-", label=role)
    axes.set(
        xlabel="block", ylabel="SQNR of the output, dB",
        title="error of each layer on the float model's inputs (higher is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return png(canvas)


def group_allocation(
    best: list[float],
    mean: list[float],
    groups: dict[str, int],
    places: Mapping[str, Place],
) -> bytes:
    """Draw a search for group sizes (Q-DiT, algorithm 1) and what it chose.

    Args:
        best: the least loss up to each round.
        mean: each round's mean loss.
        groups: per layer, the size chosen; those outside the blocks are left out.
        places: per layer, its role and block.
    """
    canvas = Canvas(figsize=(11, 5.6), layout="constrained")
    top, bottom = canvas.subplots(2, 1, height_ratios=(3, 2))
    _draw_rounds(top, best, mean)
    _draw_groups(bottom, by_role(groups, places), blocks_of(groups, places))
    return png(canvas)


def _draw_rounds(axes: Axes, best: list[float], mean: list[float]) -> None:
    """Draw the losses of a search, round by round."""
    rounds = range(1, len(best) + 1)
    axes.plot(rounds, mean, "o-", color="tab:gray", label="mean of the round")
    axes.plot(rounds, best, "o-", color="tab:blue", label="best so far")
    axes.set(xlabel="round", ylabel="loss", title="search for group sizes (lower is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_groups(axes: Axes, sizes: dict[str, dict[str, int]], blocks: list[str]) -> None:
    """Draw the group size of every role (a row) in every block (a column)."""
    # A role need not be in every block: what stays NaN stays blank.
    table = np.full((len(sizes), len(blocks)), np.nan)
    for row, of_role in enumerate(sizes.values()):
        for block, size in of_role.items():
            table[row, blocks.index(block)] = size
    logarithms = np.log2(table)
    image = axes.imshow(logarithms, aspect="auto", cmap="viridis", interpolation="nearest")
    for row, column in np.argwhere(~np.isnan(table)):
        color = "white" if image.norm(logarithms[row, column]) < DARK else "black"
        axes.text(
            column, row, f"{table[row, column]:.0f}",
            ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(sizes)), list(sizes))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block", title=f"group size of each layer, mean {np.nanmean(table):.1f}")


def sqnr_over_steps(curves: dict[str, list[float]]) -> bytes:
    """Draw the SQNR of the latents after each step, a line per row of the comparison."""
    canvas = Canvas(figsize=(10, max(4.5, 0.8 + 0.25 * len(curves))), layout="constrained")
    axes = canvas.subplots()
    # The legend lists them from top to bottom as the lines end.
    ordered = sorted(curves.items(), key=lambda curve: -curve[1][-1])
    styles = ("-", "--", ":")
    for i, (label, values) in enumerate(ordered):
        # Ten colors, then the same ones with other dashes.
        color, style = f"C{i % 10}", styles[i // 10 % len(styles)]
        axes.plot(range(len(values)), values, color=color, linestyle=style, label=label)
    axes.set(
        xlabel="step (0 is the noisiest)", ylabel="SQNR of the latents, dB",
        title="distance from the float model along the trajectory")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return png(canvas)


def same_seeds(rows: dict[str, NDArray]) -> bytes:
    """Draw the same seeds from several models: a row of images, uint8 (N, H, W, 3), per label."""
    count = min(len(images) for images in rows.values())
    size = (3 + 0.8 * count, 0.1 + 0.82 * len(rows))
    canvas = Canvas(figsize=size, layout="constrained")
    grid = canvas.subplots(len(rows), count, squeeze=False)
    for line, (label, images) in zip(grid, rows.items()):
        for axes, image in zip(line, images):
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    return png(canvas)
