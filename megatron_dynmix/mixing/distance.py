"""How far apart the sources' gate loads are, and the score ``delta`` made from that.

Axes: D sources, E experts (of all chosen layers).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def l2_distance(load_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean distance between every two rows: delta_ij = ||O_i - O_j||_2, Zhu et al. (2025), section 3.

    Returns:
        distance_DD, symmetric, its diagonal exactly 0.

    Raises:
        ValueError: not two axes, or a NaN or infinite load.

    """
    if load_DE.ndim != 2 or not np.isfinite(load_DE).all():
        raise ValueError(f"loads of shape {load_DE.shape} must be [sources, experts] and finite")
    # Row by row: all pairs at once would take D * D * E floats, 256 MiB for 64 sources and 32 layers of 256.
    return np.stack([np.linalg.norm(load_DE - load_E, axis=1) for load_E in load_DE])


def cosine_distance(load_DE: NDArray[np.float64]) -> NDArray[np.float64]:
    """One minus the cosine similarity of every two rows.

    Returns:
        distance_DD, symmetric, its diagonal exactly 0.

    Raises:
        ValueError: not two axes, a NaN or infinite load, or a row of zeros (it has no direction).

    """
    length_D = np.linalg.norm(load_DE, axis=-1)
    if (length_D == 0).any():
        raise ValueError(
            f"source {int(np.argmin(length_D))} (counted from 0) has a load of zeros: no direction"
        )
    # For unit vectors 1 - cos = |u - v|^2 / 2. This form gives 0 for equal loads and keeps the digits
    # of close ones, which 1 - u.v loses.
    return l2_distance(load_DE / length_D[..., None]) ** 2 / 2


DISTANCES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "l2": l2_distance,
    "cos": cosine_distance,
}
AGGREGATES = ("mean", "max")


def source_delta(distance_DD: NDArray[np.float64], aggregate: str) -> NDArray[np.float64]:
    """Score of each source: larger means further from the others, hence less redundant.

    Args:
        distance_DD: symmetric distances, diagonal 0.
        aggregate: ``"mean"`` is Delta_i = sum_j delta_ij / D of Zhu et al. (2025), section 3: divided by D,
            though only D - 1 terms can be positive; ``"max"`` takes the furthest source.

    Raises:
        ValueError: not a square finite matrix, or another aggregate.

    """
    if (
        distance_DD.ndim != 2
        or distance_DD.shape[0] != distance_DD.shape[1]
        or not np.isfinite(distance_DD).all()
    ):
        raise ValueError(f"distances of shape {distance_DD.shape} must be [sources, sources] and finite")
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate {aggregate!r} is unknown; give one of {AGGREGATES}")
    if aggregate == "mean":
        return np.asarray(distance_DD.mean(axis=1))
    return np.asarray(distance_DD.max(axis=1))
