"""The shards of a checkpoint: Megatron-Core's `torch_dist`, written so that nothing fails on one rank alone.

What is replaced of Megatron-Core 0.16.1:

* an error of the coordinator (`common.pt`, `.metadata`) left all other ranks waiting: here all ranks raise;
* write results went through a manager process, which outlives a rank that is killed: here through a file;
* the files were written by children of the forked process, which waited for ever if one of them was killed:
  here by threads of that process, so that there is nobody to wait for;
* each rank's files are hashed by the thread that wrote them.
"""

from __future__ import annotations

import gc
import pickle
import queue
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_dynmix.checkpoint.folder import Checksum, checksum
from megatron_dynmix.job.agreement import together
from megatron_dynmix.platform.megatron_patches import use_results_queue
from megatron_dynmix.platform.versions import request_shards

BACKEND = ("torch_dist", 1)


class Mailbox:
    """One message from a forked process to the process it was forked from; no third process is needed."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  open as long as this is

    def put(self, message: Any) -> None:
        """Leave the message; the process may end then."""
        self._file.seek(0)
        pickle.dump(message, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the message; `queue.Empty` if the process ended without one."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:
            raise queue.Empty("the process that writes the shards ended early") from None


class ShardWriter(TorchDistSaveShardedStrategy):
    """Writes the shards of one checkpoint; `sums` holds the checksums of all ranks' files afterwards."""

    def __init__(self) -> None:
        super().__init__(*BACKEND)
        self.sums: dict[str, Checksum] = {}
        self._own_sums = Mailbox()
        use_results_queue(Mailbox())

    def request(self, state: dict[str, Any], folder: Path) -> AsyncRequest:
        """Do what `dist_checkpointing.save` does before the shards are written; return what is left to do."""
        sharded, common = save_preprocess(state)
        with together():
            if torch.distributed.get_rank() == 0:
                # Later versions write this into the shards, but all read this file.
                torch.save(common, folder / COMMON_STATE_FNAME)
                save_config(CheckpointingConfig(*BACKEND), str(folder))
        return request_shards(self, sharded, folder)

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, *strategy: str
    ) -> AsyncRequest:
        write, stage, arguments = writer.get_save_function_and_args()
        return AsyncRequest(
            # Of Megatron-Core's function only the arguments are taken: it would start processes of its own.
            None if write is None else partial(_write_and_hash, write.args[0], self._own_sums),
            arguments,
            [partial(self._finish, writer, save_state_dict_ret[1])],
            preload_fn=stage,
        )

    def _finish(self, writer: Any, metadata: Any) -> None:
        """Collect what all ranks have written; rank 0 writes `.metadata`."""
        own_sums: dict[str, Checksum] = {}
        with together():
            results = writer.retrieve_write_results()
            if not isinstance(results, list):
                raise results[0]
            if writer.write_buckets:
                own_sums = self._own_sums.get_nowait()
        rank0 = torch.distributed.get_rank() == 0
        gathered: list[Any] | None = [None] * torch.distributed.get_world_size() if rank0 else None
        torch.distributed.gather_object((results, own_sums), gathered)
        with together():
            if gathered is not None:
                writer.finish(metadata, [results for results, _ in gathered])
                self.sums = {name: own for _, sums in gathered for name, own in sums.items()}


def _write_and_hash(
    transforms: list[Any], sums: Mailbox, rank: int, buckets: list[Any], results: Mailbox
) -> None:
    """Write a rank's files in a process of its own; a failure is the result."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from a terminal the rank gets it too, and answers
    gc.disable()  # it would meet tensors of the device, which belong to the rank
    try:
        with ThreadPoolExecutor(len(buckets)) as pool:
            written = list(pool.map(partial(_write_bucket, transforms), range(len(buckets)), buckets))
        sums.put({Path(path).name: own for (path, _, _), (_, own) in zip(buckets, written, strict=True)})
    except Exception as error:  # the rank is told of it, and tells the others
        results.put(RuntimeError(str(error)))
        return
    results.put({index: items for index, (items, _) in enumerate(written)})


def _write_bucket(transforms: list[Any], index: int, bucket: Any) -> tuple[list[Any], Checksum]:
    """Write one file; return where its items are in it, and its checksum."""
    outcome: queue.Queue[tuple[int, Any]] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    running.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, running, use_fsync=True)
    _, items = outcome.get_nowait()
    if isinstance(items, Exception):
        raise items
    return items, checksum(Path(bucket[0]))
