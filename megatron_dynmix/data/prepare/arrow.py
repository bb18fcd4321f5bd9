"""Rows of Arrow tables: Parquet files, and the folders that Hugging Face `datasets` saves."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_dynmix.errors import InputError

_BATCH_ROWS = 256


def parquet_rows(path: Path, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file in constant memory."""
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: damaged Parquet ({_first_line(error)}); get the file again") from error


def saved_dataset_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a folder that `save_to_disk` wrote, in constant memory."""
    import pyarrow
    from pyarrow import ipc

    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
        if state.get("_indices_files"):
            raise InputError(f"{folder}: saved with a selection of rows by an old version; save it again")
        for name in names:
            with pyarrow.memory_map(str(folder / name)) as source:
                for batch in ipc.open_stream(source):
                    for start in range(0, len(batch), _BATCH_ROWS):
                        yield from batch.slice(start, _BATCH_ROWS).to_pylist()
    except InputError:
        raise
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: not a whole dataset saved by `datasets` ({_first_line(error)}); save it again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
