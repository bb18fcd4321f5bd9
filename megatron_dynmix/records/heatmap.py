"""Heat maps of gate loads and distances, as pixels for a dashboard.

Drawn by Pillow, in a hundredth of the time that a plotting library takes: an update every few iterations of a
small model would feel it. Shapes: R rows, C columns, H and W pixels.
"""

import base64
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

MOST_NAMES = 40
"""More rows than this are only numbered: their names could not be read in an image of sensible size."""
MAP_WIDTH, MAP_HEIGHT = 720, 480
"""Pixels that the cells may take, as far as each has one at least."""
MOST_CELL = 48
LINE = 18
"""Height of a line of text."""
SCALE_WIDTH = 14
FONT = ImageFont.load_default(12)
VIRIDIS = (
    b"eNqNUgkOxCAIxPq1fUL//xTpgoMD1mSXOUATqaZ8RJrTxSSiTFMqk4FUVuRU7FWC62O4QDMYEZfRYXRFdKpXHJnNz7TV2k"
    b"EeVZ35j5Af631DDqXQl0FBWEHYiXc8uz58uwi7p4acmn10XoscupecsDo7CjO6piHG8mGEfRE2asIB1Xm5+O8PghSICQ=="
)
"""The color map of that name (public domain), `[3, 256]`: each color less the one before, by zlib."""
COLOURS_256 = (
    np.frombuffer(zlib.decompress(base64.b64decode(VIRIDIS)), np.uint8).reshape(3, 256).cumsum(1, np.uint8).T
)


def gate_load_image(load: npt.ArrayLike, sources: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Image of `load_DE`, or of `load_DLE` with the layers side by side; uint8 `[H, W, 3]`."""
    load_DLE = np.asarray(load, dtype=np.float64)
    load_DC = load_DLE.reshape(len(load_DLE), -1)
    columns = "expert" if load_DLE.ndim == 2 else f"expert, {load_DLE.shape[1]} layers side by side"
    return _draw(load_DC, sources, f"gate load: share of the source's routed tokens by {columns}")


def distance_image(distance: npt.ArrayLike, sources: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Image of `distance_DD` between the sources' gate loads; uint8 `[H, W, 3]`."""
    distance_DD = np.asarray(distance, dtype=np.float64)
    return _draw(distance_DD, sources, "distance of gate loads, columns in the order of the rows")


def _draw(matrix_RC: npt.NDArray[np.float64], names: Sequence[str], title: str) -> npt.NDArray[np.uint8]:
    """Draw one matrix: title, a name and a number for each row, numbered columns, and the scale."""
    rows, columns = matrix_RC.shape
    cell_height, cell_width = (
        max(1, min(MOST_CELL, space // count)) for space, count in ((MAP_HEIGHT, rows), (MAP_WIDTH, columns))
    )
    named = [rows <= MOST_NAMES and name.isascii() for name in names]  # the font has few letters more
    labels = [f"{name}  {row}" if named[row] else str(row) for row, name in enumerate(names)]
    left = 8 + max(int(FONT.getlength(label)) for label in labels) + 6
    top, height, width = LINE + 8, rows * cell_height, columns * cell_width
    low, high = float(matrix_RC.min()), float(matrix_RC.max())
    scale_left = left + width + 16
    right = scale_left + SCALE_WIDTH + 8 + int(FONT.getlength(f"{max(abs(low), abs(high)):.4g}")) + 24
    page = Image.new("RGB", (max(right, 16 + int(FONT.getlength(title))), top + height + LINE + 8), "white")
    index_RC = np.zeros((rows, columns), np.uint8)
    if high > low:
        index_RC = np.round((matrix_RC - low) / (high - low) * 255).astype(np.uint8)
    cells = Image.fromarray(COLOURS_256[index_RC])
    page.paste(cells.resize((width, height), Image.Resampling.NEAREST), (left, top))
    scale = Image.fromarray(COLOURS_256[::-1, None])
    page.paste(scale.resize((SCALE_WIDTH, height), Image.Resampling.NEAREST), (scale_left, top))

    pen = ImageDraw.Draw(page)
    pen.text((8, 4), title, "black", FONT)
    for row in _legible(rows, cell_height, LINE):
        pen.text((left - 6, top + (row + 0.5) * cell_height), labels[row], "black", FONT, anchor="rm")
    for column in _legible(columns, cell_width, 2 * LINE):
        pen.text((left + (column + 0.5) * cell_width, top + height + 4), str(column), "black", FONT, "mt")
    for value, y, anchor in ((high, top, "lt"), (low, top + height, "lb")):
        pen.text((scale_left + SCALE_WIDTH + 6, y), f"{value:.4g}", "black", FONT, anchor)
    return np.asarray(page)


def _legible(count: int, size: int, room: int) -> range:
    """Every so many of the rows or columns, that their labels have room."""
    return range(0, count, -(-room // size) if size < LINE else 1)
