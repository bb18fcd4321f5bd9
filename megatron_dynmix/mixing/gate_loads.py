"""Gate load: the share of a source's routed tokens that each expert received.

Axes: D sources, L MoE layers, K chosen layers, E experts. In ``load_DE`` the experts of the chosen layers
stand side by side.
"""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import SourceError

Counts = NDArray[np.int64] | NDArray[np.float64]


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


def at_layers(counts_DLE: Counts, layers: str | Sequence[int]) -> Counts:
    """The chosen layers of counts `[..., L, E]`; see `select_layers`. A view where that is possible."""
    chosen = select_layers(layers, counts_DLE.shape[-2])
    if chosen == list(range(counts_DLE.shape[-2])):
        return counts_DLE
    return counts_DLE[..., slice(chosen[0], chosen[0] + 1) if len(chosen) == 1 else chosen, :]


def gate_load(
    counts_DLE: Counts,
    layers: str | Sequence[int],
    *,
    by_layer: bool = False,
) -> NDArray[np.float64]:
    """Turn token counts into loads: O_i / sum(O_i), Zhu et al. (2025), section 3.

    Args:
        counts_DLE: tokens routed to each expert, padding not counted.
        layers: see `select_layers`. With several, their experts are concatenated before dividing.
        by_layer: divide each layer by its own sum instead.

    Returns:
        load_DE, shape [D, len(layers) * E]; every row sums to 1, or every layer of every row does.

    Raises:
        ValueError: not three axes, or a source (named by its index) without tokens or with a negative, NaN or
            infinite count.

    """
    if counts_DLE.ndim != 3:
        raise ValueError(f"counts have shape {counts_DLE.shape}; give [sources, layers, experts]")
    load_DKE = at_layers(counts_DLE, layers).astype(np.float64)
    if not by_layer:
        load_DKE = load_DKE.reshape(len(counts_DLE), 1, -1)
    total_DK = load_DKE.sum(axis=2)
    if not (np.isfinite(total_DK).all() and total_DK.all() and load_DKE.min() >= 0):
        _refuse(load_DKE)
    load_DKE /= total_DK[:, :, None]
    return load_DKE.reshape(len(counts_DLE), -1)


def _refuse(load_DKE: NDArray[np.float64]) -> NoReturn:
    """Name the first source whose counts are no load."""
    for dataset_id, load_KE in enumerate(load_DKE):
        if not np.isfinite(load_KE).all() or (load_KE < 0).any():
            raise SourceError(
                [dataset_id],
                f"has a negative, NaN or infinite expert load: {load_KE.tolist()}; loads are token counts",
            )
        if not load_KE.any(axis=1).all():
            raise SourceError([dataset_id], "has no routed tokens; measure it on some rows")
    raise ValueError("the counts of a source are too large to be added")
