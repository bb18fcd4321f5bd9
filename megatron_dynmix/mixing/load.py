"""Gate load: the share of a source's routed tokens that each expert received.

Axes: D sources, L MoE layers, E experts. In ``load_DE`` the experts of the chosen layers stand side by side.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def check_layers(layers: str | Sequence[int]) -> None:
    """Raise ValueError unless ``layers`` is ``"last"``, ``"all"`` or distinct indices >= 0, at least one."""
    if isinstance(layers, str):
        if layers not in ("last", "all"):
            raise ValueError(
                f"layers {layers!r} is unknown; give 'last', 'all' or a list of zero-based indices"
            )
    elif (
        len(layers) == 0
        or len(set(layers)) < len(layers)
        or not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
    ):
        raise ValueError(f"layers {list(layers)} are not distinct indices >= 0, at least one")


def select_layers(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """Which of ``num_layers`` MoE layers to measure, as zero-based indices.

    Args:
        layers: ``"last"`` (the paper: deeper layers are more specialised), ``"all"``, or indices among
            the MoE layers only; dense layers are not counted.
        num_layers: number of MoE layers in the model, at least 1.

    Raises:
        ValueError: another word, no index, an index outside the model, or one given twice.

    """
    if num_layers < 1:
        raise ValueError(f"the model has {num_layers} MoE layers; a gate load needs at least one")
    check_layers(layers)
    if layers == "last":
        return [num_layers - 1]
    if layers == "all":
        return list(range(num_layers))
    chosen = [int(layer) for layer in layers]
    if max(chosen) >= num_layers:
        raise ValueError(
            f"layer {max(chosen)} was chosen, but the model has {num_layers} MoE layers; "
            f"give indices from 0 to {num_layers - 1} (dense layers are not counted)"
        )
    return chosen


def gate_load(
    counts_DLE: NDArray[np.int64] | NDArray[np.float64], layers: str | Sequence[int]
) -> NDArray[np.float64]:
    """Turn token counts into loads: O_i / sum(O_i), Zhu et al. (2025), section 3.

    Args:
        counts_DLE: tokens routed to each expert, padding not counted.
        layers: see `select_layers`. With several, their experts are concatenated before dividing.

    Returns:
        load_DE, shape [D, len(layers) * E]; every row sums to 1.

    Raises:
        ValueError: not three axes, or a source (named by its index) without tokens or with a negative, NaN or
            infinite count.

    """
    if counts_DLE.ndim != 3:
        raise ValueError(f"counts have shape {counts_DLE.shape}; give [sources, layers, experts]")
    chosen = select_layers(layers, counts_DLE.shape[1])
    load_DE = counts_DLE[:, chosen].reshape(len(counts_DLE), -1).astype(np.float64)
    for dataset_id, load_E in enumerate(load_DE):
        total = load_E.sum()
        if not np.isfinite(total) or (load_E < 0).any():
            raise ValueError(
                f"source {dataset_id} (counted from 0) has a negative, NaN or infinite expert load: "
                f"{load_E.tolist()}; loads are token counts"
            )
        if total == 0:
            raise ValueError(
                f"source {dataset_id} (counted from 0) has no routed tokens; measure it on some rows"
            )
    return np.asarray(load_DE / load_DE.sum(axis=1, keepdims=True))
