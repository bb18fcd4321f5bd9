"""Where the host waits for the device: by file and line of Megatron-Core's code or ours."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def synchronizations(device: torch.device) -> Iterator[Counter[str]]:
    """Count the waits inside the block, as `{"megatron_dynmix/training/step.py:95": 1, ...}`.

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
        seen[_where()] += 1


class _ReadValues(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen[_where()] += 1
        return func(*args, **(kwargs or {}))


def _where() -> str:
    """Return the line of Megatron-Core or of this project that has called."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in ("megatron_dynmix/", "megatron/core/"):
            if package in path:
                return f"{package}{path.rpartition(package)[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
