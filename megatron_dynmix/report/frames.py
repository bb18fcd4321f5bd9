"""Heat maps over the updates: a few of them as bytes, so that a page of thousands of updates stays small.

Axes: F frames, R rows, C columns of a heat map; D sources, L layers, E experts.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_FRAMES = 60
MOST_CELLS = 1_500_000
"""Of all frames of a heat map; one byte each."""
COLOURED = 0.995
"""Share of the values in a run's second half that the colours tell apart: its first loads may be far from
all others."""
MOST_COLUMNS = 256
"""Of gate loads; a model with more experts in all its layers is shown by the mean over its layers."""


@dataclass(frozen=True)
class Frame:
    """One heat map."""

    iteration: int
    sources: tuple[str, ...]
    values_RC: NDArray[np.float64]


def array(values: Any, sources: int) -> NDArray[np.float64] | None:
    """Numbers of a record with one entry per source, at least 2 axes; None if they are not that."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return found if found.ndim >= 2 and len(found) == sources and found.size else None


def flat_load(load: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gate loads `[D, E]`, or `[D, L, E]` with the layers side by side, as `[D, C]`."""
    if load.ndim == 2 or load.shape[1] * load.shape[2] <= MOST_COLUMNS:
        return load.reshape(len(load), -1)
    mean_DE: NDArray[np.float64] = load.mean(axis=1)
    return mean_DE


def quantised(frames: Sequence[Frame]) -> dict[str, Any] | None:
    """Frames as the page reads them: 0 to 255 for 0 to the largest value of all, in base64.

    Frames of other sources or experts than the last are left out: they have other axes. The keys:
    `iterations`, `shape` [F, R, C], `most` (the value of 255),
    `coloured_most` (the value of the last colour), `sources`, `bytes`, `left_out`.
    """
    if not frames:
        return None
    last = frames[-1]
    alike = [
        frame
        for frame in frames
        if frame.sources == last.sources and frame.values_RC.shape == last.values_RC.shape
    ]
    values_FRC = np.nan_to_num(np.stack([frame.values_RC for frame in alike]), posinf=0.0, neginf=0.0)
    most = float(values_FRC.max()) or 1.0
    bytes_FRC = np.rint(values_FRC.clip(min=0) * (255 / most)).astype(np.uint8)
    return {
        "iterations": [frame.iteration for frame in alike],
        "shape": list(bytes_FRC.shape),
        "most": most,
        "coloured_most": float(np.quantile(values_FRC[len(alike) // 2 :], COLOURED)) or most,
        "sources": list(last.sources),
        "bytes": base64.b64encode(bytes_FRC.tobytes()).decode("ascii"),
        "left_out": len(frames) - len(alike),
    }
