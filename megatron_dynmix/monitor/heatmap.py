"""Heat maps of gate loads and distances, drawn to pixels.

Shapes: R rows, C columns, H and W pixels. pyplot is left alone: its global state would hold every figure
of a long run, and it may look for a display.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# more names than this cannot be read in a figure of sensible size: source numbers stand in for them
MOST_NAMES = 40


def gate_load_image(load: npt.ArrayLike, sources: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Image of `load_DE`, or of `load_DLE` with the layers side by side; uint8 `[H, W, 3]`."""
    load_DLE = np.asarray(load, dtype=np.float64)
    load_DC = load_DLE.reshape(len(load_DLE), -1)
    columns = "expert" if load_DLE.ndim == 2 else f"expert, {load_DLE.shape[1]} layers side by side"
    return _draw(load_DC, sources, None, title="gate load", columns=columns, scale="share of routed tokens")


def distance_image(distance: npt.ArrayLike, sources: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Image of `distance_DD` between the sources' gate loads; uint8 `[H, W, 3]`."""
    distance_DD = np.asarray(distance, dtype=np.float64)
    return _draw(
        distance_DD, sources, sources, title="distance", columns="source", scale="distance of gate loads"
    )


def _draw(
    matrix_RC: npt.NDArray[np.float64],
    row_names: Sequence[str],
    column_names: Sequence[str] | None,
    *,
    title: str,
    columns: str,
    scale: str,
) -> npt.NDArray[np.uint8]:
    """Draw one matrix with labelled axes and a colour bar; columns without names are numbered."""
    n_rows, n_columns = matrix_RC.shape
    inches = (min(5 + 0.25 * n_columns, 14), min(2 + 0.25 * n_rows, 12))
    figure = Figure(figsize=inches, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(matrix_RC, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(picture, ax=axes, label=scale)
    axes.set(title=title, xlabel=columns, ylabel="source")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if n_rows <= MOST_NAMES:
        axes.set_yticks(range(n_rows), labels=[_verbatim(name) for name in row_names])
    if column_names is not None and n_columns <= MOST_NAMES:
        axes.set_xticks(range(n_columns), labels=[_verbatim(name) for name in column_names], rotation=90)
    canvas.draw()
    pixels_HW4 = np.asarray(canvas.buffer_rgba())
    return pixels_HW4[..., :3].copy()


def _verbatim(name: str) -> str:
    """A name as matplotlib prints it unchanged: two dollar signs would be read as a formula."""
    return name.replace("$", r"\$")
