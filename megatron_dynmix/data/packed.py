"""Which examples of a source go into which row, from its index alone.

Shape legend: N examples in rows, D documents of the source, Q sequences (runs) of the source, R1 = rows + 1.
An example of n tokens takes n - 1 positions: inputs are its tokens but the last, labels its tokens but the
first.
"""

import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config.run_config import Overlong
from megatron_dynmix.data.index_file import SequenceIndex, read_index
from megatron_dynmix.data.packing import Packing, one_per_row, pack
from megatron_dynmix.data.prepared import load_report
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import replacing, sha256

_PACKING_VERSION = 1  # raised when the same source would be packed otherwise


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """What became of a source's examples: ``examples + dropped_overlong + untrained`` is all of them.

    ``examples`` are in the rows, ``truncated`` of them cut; ``untrained`` had no label to train on
    (left). ``tokens`` are positions that hold an example's token, ``useful_token_share`` their share
    of all positions of all rows.
    """

    examples: int
    dropped_overlong: int
    truncated: int
    untrained: int
    rows: int
    tokens: int
    useful_token_share: float


class PackedSource:
    """A prepared source whose examples have been given their rows."""

    def __init__(
        self,
        *,
        name: str,
        prefix: Path,
        seq_length: int,
        seed: int,
        overlong: Overlong,
        cache_dir: Path | None,
        packing: bool = True,
        segment_multiple: int = 1,
    ) -> None:
        """Pack a prepared source into rows; the packing is kept in ``cache_dir`` if one is given.

        Without ``packing`` a row holds one example. Each begins at a multiple of ``segment_multiple``, which
        divides ``seq_length``. Over-long is an example of more than ``seq_length``
        positions: dropped and counted, truncated, or refused. Examples without a trained label in their
        positions are dropped and counted. An InputError says that the source is not prepared, that
        ``overlong`` is unknown or "error" and there is an over-long example, or that no row results.
        """
        if overlong not in get_args(Overlong):
            raise InputError(f"overlong {overlong!r} is unknown; use {', '.join(get_args(Overlong))}")
        if seq_length < 1:
            raise InputError(f"seq_length {seq_length}: a row needs at least one position")
        assert seq_length % segment_multiple == 0, "checked before"
        source = load_report(prefix)
        lengths_D, trained_D = _positions(read_index(prefix), seq_length)
        overlong_D = lengths_D > seq_length
        if overlong == "error" and overlong_D.any():
            raise InputError(
                f"source {name}: {overlong_D.sum()} of {len(lengths_D)} examples are longer than seq_length "
                f"{seq_length} (the longest takes {lengths_D.max()} positions); raise seq_length, or set "
                "overlong to drop or truncate"
            )
        dropped_D = overlong_D & (overlong in ("drop", "split"))  # what no split made short enough
        kept_D = ~dropped_D & (trained_D > 0)
        if not kept_D.any():
            raise InputError(
                f"source {name}: no row results, {dropped_D.sum()} of {len(kept_D)} examples are longer "
                f"than seq_length {seq_length} and the rest have no trained label; raise seq_length"
            )
        kept_N = np.flatnonzero(kept_D)
        lengths_N = np.minimum(lengths_D[kept_N], seq_length)
        if packing:
            key = [source.fingerprint, seq_length, seed, overlong, segment_multiple, _PACKING_VERSION]
            padded_N = -(-lengths_N // segment_multiple) * segment_multiple
            packed = _cached_pack(padded_N, seq_length, seed, cache_dir, key)
        else:
            packed = one_per_row(len(lengths_N), seed)
        tokens = int(lengths_N.sum())
        self.name, self.prefix, self.seq_length, self.seed = name, prefix, seq_length, seed
        self.segment_multiple = segment_multiple
        self.documents_N, self.row_starts_R1 = kept_N[packed.order_N], packed.row_starts_R1
        self.packing_report = PackingReport(
            examples=len(kept_N),
            dropped_overlong=int(dropped_D.sum()),
            truncated=int((overlong_D & kept_D).sum()),
            untrained=int((~dropped_D & (trained_D == 0)).sum()),
            rows=packed.num_rows,
            tokens=tokens,
            useful_token_share=tokens / (packed.num_rows * seq_length),
        )

    @property
    def mean_examples_per_row(self) -> float:
        """Examples per row, on average."""
        return self.packing_report.examples / self.packing_report.rows

    @property
    def most_segments(self) -> int:
        """Segments that a row can have: as many as the fullest has examples, and its padding."""
        return int(np.diff(self.row_starts_R1).max()) + 1


def _positions(index: SequenceIndex, seq_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each document's positions and how many trained labels its first ``seq_length`` hold."""
    lengths_Q = index.lengths_Q.astype(np.int64)
    modes_Q = index.modes_Q.astype(np.int64)
    token_starts_Q1 = np.concatenate([[0], np.cumsum(lengths_Q)])
    trained_starts_Q1 = np.concatenate([[0], np.cumsum(lengths_Q * modes_Q)])
    first_D, last_D = index.documents_D1[:-1], index.documents_D1[1:]
    lengths_D = token_starts_Q1[last_D] - token_starts_Q1[first_D] - 1

    # The last label that fits lies in some run of the document: all runs before it, and a part of it.
    ends_D = token_starts_Q1[first_D] + np.minimum(lengths_D, seq_length) + 1
    run_D = np.searchsorted(token_starts_Q1, ends_D, side="left") - 1
    trained_D = trained_starts_Q1[run_D] + modes_Q[run_D] * (ends_D - token_starts_Q1[run_D])
    # the first token is an input only, never a label
    return lengths_D, trained_D - trained_starts_Q1[first_D] - modes_Q[first_D]


def _cached_pack(
    lengths_N: NDArray[np.int64], capacity: int, seed: int, cache_dir: Path | None, key: list[Any]
) -> Packing:
    if cache_dir is None:
        return pack(lengths_N, capacity, seed)
    path = cache_dir / f"packing-{sha256(key)[:32]}.npz"
    try:
        with np.load(path) as arrays:
            return Packing(arrays["order_N"], arrays["row_starts_R1"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or damaged: the same packing is made again in a second
    packing = pack(lengths_N, capacity, seed)
    with suppress(OSError):  # a folder that only others write to, or a full disk: it is packed again then
        cache_dir.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:  # ranks may race: equal results replace one another whole
            np.savez(file, order_N=packing.order_N, row_starts_R1=packing.row_starts_R1)
    return packing
