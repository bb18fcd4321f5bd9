"""Gate load: the share of a source's routed tokens that each expert received.

Axes: D sources, L MoE layers, E experts; H = 2 halves may stand before them.
"""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import Counts, SourceError


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
    """Choose among the MoE layers of a model; dense layers are not counted.

    Args:
        layers: ``"last"`` (the paper: deeper layers are more specialized), ``"all"``, or zero-based indices.
        num_layers: number of MoE layers in the model.

    Raises:
        ValueError: layers that `check_layers` refuses, an index outside the model, or a model without MoE.

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


def at_layers(counts_DLE: Counts, layers: str | Sequence[int]) -> Counts:
    """Return the chosen layers of counts `[..., L, E]`, as a view where that is possible."""
    chosen = select_layers(layers, counts_DLE.shape[-2])
    if chosen == list(range(counts_DLE.shape[-2])):
        return counts_DLE
    return counts_DLE[..., slice(chosen[0], chosen[0] + 1) if len(chosen) == 1 else chosen, :]


def gate_load(
    counts_DLE: Counts, layers: str | Sequence[int], *, by_layer: bool = False
) -> NDArray[np.float64]:
    """Turn token counts into loads: O_i / sum(O_i), Zhu et al. (2025), section 3.

    Args:
        counts_DLE: tokens routed to each expert, padding not counted.
        layers: see `select_layers`.
        by_layer: divide each layer by its own sum; otherwise the chosen layers of a source by their sum.

    Returns:
        load_DLE of the chosen layers, in the order chosen.

    Raises:
        SourceError: a source without tokens, or with a negative, NaN or infinite count.
        ValueError: not three axes, or counts too large to add.

    """
    if counts_DLE.ndim != 3:
        raise ValueError(f"counts have shape {counts_DLE.shape}; give [sources, layers, experts]")
    load_DLE: NDArray[np.float64] = np.ascontiguousarray(at_layers(counts_DLE, layers), np.float64)
    grouped_DGE = load_DLE if by_layer else load_DLE.reshape(len(load_DLE), 1, -1)
    total_DG = grouped_DGE.sum(axis=2)
    if not (np.isfinite(total_DG).all() and total_DG.all() and load_DLE.min() >= 0):
        _refuse(grouped_DGE)
    load_DLE = load_DLE / total_DG[:, :, None]
    return load_DLE


def _refuse(load_DGE: NDArray[np.float64]) -> NoReturn:
    """Name the first source whose counts are no load."""
    for dataset_id, load_GE in enumerate(load_DGE):
        if not np.isfinite(load_GE).all() or (load_GE < 0).any():
            raise SourceError(
                [dataset_id],
                f"has a negative, NaN or infinite expert load: {load_GE.tolist()}; loads are token counts",
            )
        if not load_GE.any(axis=1).all():
            raise SourceError([dataset_id], "has no routed tokens; measure it on some rows")
    raise ValueError("the counts of a source are too large to be added")
