"""What strategies need of a signal, or a refusal that says what is missing.

Axes: D sources.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.mixing.strategy import Signal


def loss_of(signal: Signal, num_sources: int, strategy: str) -> NDArray[np.float64]:
    """The losses of the signal, one finite number of nats >= 0 per source.

    Raises:
        ValueError: not measured, another number of sources, or a source (named by its index) whose loss is
            NaN (nothing of it was ever measured), infinite or negative.

    """
    if signal.loss_D is None:
        raise ValueError(f"{strategy} mixing needs a loss per source; the signal holds none")
    loss_D = np.asarray(signal.loss_D, dtype=np.float64)
    if loss_D.shape != (num_sources,):
        raise ValueError(
            f"losses have shape {loss_D.shape}; {strategy} mixing needs one per source, ({num_sources},)"
        )
    bad = np.flatnonzero(~(np.isfinite(loss_D) & (loss_D >= 0)))
    if bad.size:
        raise ValueError(
            f"source {bad[0]} (counted from 0) has the loss {loss_D[bad[0]]}; {strategy} mixing needs a "
            "finite mean loss >= 0 of every source (NaN: no trained token of it was measured yet)"
        )
    return loss_D


def size_of(signal: Signal, num_sources: int, strategy: str) -> NDArray[np.float64]:
    """Rows in one epoch of each source, all >= 1.

    Raises:
        ValueError: not given, another number of sources, or a source without a row.

    """
    need = f"{strategy} mixing needs the size of every source in rows"
    return _rows(signal.size_D, num_sources, need, lowest=1)


def drawn_of(signal: Signal, num_sources: int, strategy: str) -> NDArray[np.float64]:
    """Rows of each source drawn so far, all >= 0.

    Raises:
        ValueError: not given, another number of sources, or a negative number.

    """
    need = f"{strategy} mixing needs the rows drawn of every source"
    return _rows(signal.drawn_D, num_sources, need, lowest=0)


def _rows(
    given_D: NDArray[np.int64] | None, num_sources: int, need: str, *, lowest: int
) -> NDArray[np.float64]:
    if given_D is None:
        raise ValueError(f"{need}; the signal does not tell")
    rows_D = np.asarray(given_D, dtype=np.float64)
    if rows_D.shape != (num_sources,) or not (np.isfinite(rows_D) & (rows_D >= lowest)).all():
        raise ValueError(f"{need}: {num_sources} numbers >= {lowest}, not {rows_D.tolist()}")
    return rows_D


def numbers_of(values: object, what: str, *, lowest: float = -np.inf) -> NDArray[np.float64]:
    """A list of numbers given as an option, as a flat finite array.

    Raises:
        ValueError: not a flat list of numbers, none at all, or one that is not finite or below ``lowest``.

    """
    try:
        numbers_D = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} {values!r} is not a list of numbers; give one per source") from None
    if numbers_D.ndim != 1 or numbers_D.size == 0:
        raise ValueError(f"{what} {values!r} is not a flat list; give one number per source")
    bad = np.flatnonzero(~(np.isfinite(numbers_D) & (numbers_D >= lowest)))
    if bad.size:
        bound = f" >= {lowest:g}" if np.isfinite(lowest) else ""
        raise ValueError(
            f"{what} of source {bad[0]} (counted from 0) is {numbers_D[bad[0]]:g}; "
            f"give a finite number{bound}"
        )
    return numbers_D
