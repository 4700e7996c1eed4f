"""The figures of a report, each drawn from plain arrays, as PNG bytes."""
import io

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from architectures.dit import BLOCK_LINEARS

DPI = 110


def _png(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _thinned(values: NDArray, rows: int, columns: int) -> NDArray:
    """At most ``rows`` x ``columns`` values, each the maximum of a block, so that no outlier is lost."""
    for axis, most in enumerate((rows, columns)):
        starts = np.unique(np.linspace(0, values.shape[axis], most, endpoint=False).astype(int))
        values = np.maximum.reduceat(values, starts, axis=axis)
    return values


def channel_magnitude(name: str, before: NDArray, after: NDArray) -> bytes:
    """Magnitude over tokens and input channels of one layer's input (T, I), before and after smoothing (DiTAS, appendix, figures 1 to 4)."""
    canvas = Canvas(figsize=(11, 4.6), layout="constrained")
    for i, (values, title) in enumerate(((before, "before"), (after, "after"))):
        axes = canvas.add_subplot(1, 2, i + 1, projection="3d")
        heights = _thinned(values, 64, 512)
        tokens, channels = np.meshgrid(*(np.linspace(0, full - 1, n) for full, n in zip(values.shape, heights.shape)), indexing="ij")
        axes.plot_surface(channels, tokens, heights, cmap="coolwarm", rstride=1, cstride=1, linewidth=0, antialiased=False)
        axes.set(title=f"{name}, {title} smoothing", xlabel="input channel", ylabel="token", zlabel="magnitude")
        axes.set_zlim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_box_aspect((2, 1, 1), zoom=0.95)
        axes.view_init(elev=25, azim=-60)
    return _png(canvas)


def channel_maxima(name: str, absmax: NDArray) -> bytes:
    """Largest magnitude of each input channel at each step, (steps, I), log scale, beside the maximum over steps that TAS uses."""
    canvas = Canvas(figsize=(11, 4.6), layout="constrained")
    left, right = canvas.subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(np.log10(absmax.clip(min=1e-4)), aspect="auto", cmap="viridis", interpolation="nearest")
    canvas.colorbar(image, ax=left, label="log10 of the maximum")
    left.set(title=name, xlabel="input channel", ylabel="step (0 is the noisiest)")
    order = np.argsort(-absmax.max(0))
    right.semilogy(absmax.max(0)[order], color="black", label="over all steps (TAS)")
    for step in sorted({0, len(absmax) // 2, len(absmax) - 1}):
        right.semilogy(absmax[step][order], linewidth=0.8, label=f"at step {step}")
    right.set(title="channel maxima, sorted", xlabel="rank of the channel")
    right.legend()
    return _png(canvas)


def alpha_losses(losses: dict[str, NDArray], alphas: tuple[float, ...], chosen: dict[str, float]) -> bytes:
    """Loss of every candidate over the layer's least, as a heat map of layers and migration strengths; a dot is the one chosen."""
    table = np.stack([np.asarray(values) / np.min(values) for values in losses.values()])
    canvas = Canvas(figsize=(9, 1.5 + 0.2 * len(table)), layout="constrained")
    axes = canvas.subplots()
    image = axes.imshow(np.log10(table), aspect="auto", cmap="magma", interpolation="nearest")
    canvas.colorbar(image, ax=axes, label="log10 (loss / least loss of the layer)")
    axes.plot([int(np.argmin(np.abs(np.array(alphas) - chosen[name]))) for name in losses], range(len(losses)), "o", color="cyan", markersize=4)
    axes.set_xticks(range(0, len(alphas), 2), [f"{alpha:.1f}" for alpha in alphas[::2]])
    axes.set_yticks(range(len(losses)), list(losses), fontsize=7)
    axes.set(xlabel="migration strength α", title="loss against α (dot: chosen)")
    return _png(canvas)


def layer_errors(error_db: dict[str, float]) -> bytes:
    """SQNR of every layer's output over blocks, a line per kind of layer."""
    canvas = Canvas(figsize=(9, 4), layout="constrained")
    axes = canvas.subplots()
    for kind in BLOCK_LINEARS:
        values = [value for name, value in error_db.items() if name.endswith(kind)]
        if values:
            axes.plot(values, "o-", label=kind.split(".")[1])
    axes.set(xlabel="block", ylabel="SQNR of the output, dB", title="error of each layer on the float model's inputs (higher is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(canvas)


def group_allocation(best: list[float], mean: list[float], groups: dict[str, int]) -> bytes:
    """A search for group sizes (Q-DiT, algorithm 1): the least loss so far and each round's mean loss; the size chosen for every layer of the blocks."""
    inside = {name: size for name, size in groups.items() if name.startswith("blocks.")}
    kinds = list(dict.fromkeys(name.split(".", 2)[2] for name in inside))
    table = np.array([[size for name, size in inside.items() if name.endswith(kind)] for kind in kinds])  # (kinds, blocks)
    canvas = Canvas(figsize=(11, 5.6), layout="constrained")
    top, bottom = canvas.subplots(2, 1, height_ratios=(3, 2))
    rounds = range(1, len(best) + 1)
    top.plot(rounds, mean, "o-", color="tab:gray", label="mean of the round")
    top.plot(rounds, best, "o-", color="tab:blue", label="best so far")
    top.set(xlabel="round", ylabel="loss", title="search for group sizes (lower is better)")
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.grid(alpha=0.3)
    top.legend()
    image = bottom.imshow(np.log2(table), aspect="auto", cmap="viridis", interpolation="nearest")
    for (row, column), size in np.ndenumerate(table):
        dark = image.norm(np.log2(size)) < 0.6
        bottom.text(column, row, str(size), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    bottom.set_yticks(range(len(kinds)), [kind.split(".")[1] if kind in BLOCK_LINEARS else kind.split(".")[0] for kind in kinds])
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set(xlabel="block", title=f"group size of each layer, mean {np.mean(table):.1f}")
    return _png(canvas)


def sqnr_over_steps(curves: dict[str, list[float]]) -> bytes:
    """SQNR of the latents after each step, a line per row of the comparison."""
    canvas = Canvas(figsize=(10, max(4.5, 0.8 + 0.25 * len(curves))), layout="constrained")
    axes = canvas.subplots()
    for i, (label, values) in enumerate(sorted(curves.items(), key=lambda curve: -curve[1][-1])):  # listed as they end
        axes.plot(range(len(values)), values, color=f"C{i % 10}", linestyle=("-", "--", ":")[i // 10 % 3], label=label)
    axes.set(xlabel="step (0 is the noisiest)", ylabel="SQNR of the latents, dB", title="distance from the float model along the trajectory")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _png(canvas)


def same_seeds(rows: dict[str, NDArray]) -> bytes:
    """The same seeds from several models: a row of images, uint8 (N, H, W, 3), per label."""
    count = min(len(images) for images in rows.values())
    canvas = Canvas(figsize=(3 + 0.8 * count, 0.1 + 0.82 * len(rows)), layout="constrained")
    grid = canvas.subplots(len(rows), count, squeeze=False)
    for line, (label, images) in zip(grid, rows.items()):
        for axes, image in zip(line, images):
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    return _png(canvas)
