"""What the figures share: a canvas as PNG bytes, and surfaces of magnitudes."""
import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

DPI = 110


def png(canvas: Canvas) -> bytes:
    """Draw a canvas as a PNG."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def thinned(values: NDArray, rows: int, columns: int) -> NDArray:
    """Reduce to at most ``rows`` x ``columns`` values.

    Each is the maximum of a rectangle, so that no outlier is lost.
    """
    for axis, most in enumerate((rows, columns)):
        edges = np.linspace(0, values.shape[axis], most, endpoint=False)
        starts = np.unique(edges.astype(int))
        values = np.maximum.reduceat(values, starts, axis=axis)
    return values


def draw_surface(axes: Axes, values: NDArray, title: str, row_label: str = "token") -> None:
    """Draw magnitudes (R, I) as heights over rows and input channels; rows are called so."""
    heights = thinned(values, 64, 512)
    row_places = np.linspace(0, values.shape[0] - 1, heights.shape[0])
    column_places = np.linspace(0, values.shape[1] - 1, heights.shape[1])
    rows, channels = np.meshgrid(row_places, column_places, indexing="ij")
    axes.plot_surface(
        channels, rows, heights,
        cmap="coolwarm", rstride=1, cstride=1, linewidth=0, antialiased=False)
    axes.set(title=title, xlabel="input channel", ylabel=row_label, zlabel="magnitude")
    axes.set_zlim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_box_aspect((2, 1, 1), zoom=0.95)
    axes.view_init(elev=25, azim=-60)
