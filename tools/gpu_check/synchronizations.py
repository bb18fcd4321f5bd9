"""Where the host waits for the device: by file and line of Megatron-Core's code or ours."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dynmix.platform.fake.observe import place


@contextlib.contextmanager
def synchronizations(device: torch.device) -> Iterator[Counter[str]]:
    """Count the waits inside the block by place, as `Trace.waits` has them: `file:line (function)`.

    On a GPU torch says where it waits. On a CPU, where nothing waits, values that are read count.
    """
    seen: Counter[str] = Counter()
    if device.type != "cuda":
        with _ReadValues(seen):
            yield seen
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchroniz")
        warnings.showwarning = lambda message, *rest: _count(seen, str(message))  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _count(seen: Counter[str], message: str) -> None:
    if "synchroniz" in message:
        seen[place()] += 1


class _ReadValues(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen[place()] += 1
        return func(*args, **(kwargs or {}))


def beyond(seen: Mapping[str, int], traced: Mapping[str, int]) -> dict[str, int]:
    """Return the waits that a trace has not, or fewer times, by place.

    Not the other way round: torch does not tell of every wait on a GPU, of an event for instance, and some
    come in the first iteration only.
    """
    return {line: times - traced.get(line, 0) for line, times in seen.items() if times > traced.get(line, 0)}
