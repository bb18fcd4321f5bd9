"""What fake tensors show: the memory that is alive, by where it was made, and every wait for the device."""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
OURS = Path(__file__).parents[2]
OTHERS = ("/megatron/core/", "/transformer_engine/")
BACKWARD = "autograd's backward pass"
"""The place of what no line of Python asks for."""

waits: Counter[str] = Counter()
"""Waits for the device so far, by place: `file:line (function)`."""


def place() -> str:
    """Return the innermost line of ours, Megatron-Core's or Transformer Engine's that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        if path := _in_package(frame.f_code.co_filename):
            return f"{path}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back  # type: ignore[assignment]
    return BACKWARD


@functools.cache
def _in_package(path: str) -> str:
    """Return the path of a file of those packages from the package on; empty for others, and this part."""
    if path.startswith(f"{OURS}{os.sep}"):
        return "" if path.startswith(str(Path(__file__).parent)) else str(Path(path).relative_to(OURS.parent))
    starts = [start for package in OTHERS if (start := path.rfind(package)) >= 0]
    return path[max(starts) + 1 :] if starts else ""


def waited(times: int = 1) -> None:
    """Count a wait for the device, at the line that asks for it."""
    waits[place()] += times


class FakeDevice(FakeTensorMode):
    """Tensors without data. A value that is asked for is 1, and to ask for one is a wait for the device."""

    selected = 0
    """Elements that the next selection by a mask has: the mask cannot tell."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on shapes."""
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default):
            if first.is_cuda:
                waited()
            if getattr(first, "constant", None) is None:
                truth = func is not aten._local_scalar_dense.default or first.dtype is torch.bool
                return True if truth else 1.0 if first.dtype.is_floating_point else 1
        elif func is aten.masked_select.default:
            waited()
            return first.new_empty(self.selected)
        elif func in (aten._to_copy.default, aten.copy_.default):
            self._count_copy(func, args, kwargs)
        elif func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype is torch.bool]
            filled = func is not aten.index.Tensor and args[2].numel() == 1  # by a mask, without indices
            if masks and first.is_cuda and not filled:
                waited()
        return super().dispatch(func, types, args, kwargs)

    def _count_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """Count a copy between host and device, unless it is asynchronous and of pinned memory."""
        if func is aten.copy_.default:
            target, source = args[0].device.type, args[1]
            asynchronous = len(args) > 2 and args[2]
        else:
            source, asynchronous = args[0], kwargs.get("non_blocking", False)
            target = torch.device(kwargs.get("device") or source.device).type
        if {target, source.device.type} == {"cpu", "cuda"}:
            source.constant = None  # the value would be copied too, and there is no device to hold it
            unpinned = source.device.type == "cpu" and not is_pinned(source)
            if not asynchronous or unpinned:
                waited()


@functools.cache
def device_here() -> FakeDevice:
    """Return the one device of this process."""
    return FakeDevice()


def pin(tensor: Tensor, device: Any = None) -> Tensor:
    """Return a fake tensor that is in pinned memory: what is read of files is real until then."""
    if not isinstance(tensor, FakeTensor):
        tensor = device_here().from_tensor(tensor)
    tensor._is_pinned_here = True
    return tensor


def tolist(tensor: FakeTensor) -> Any:
    """Return its values if they are known, or ones; torch would ask for one after the other."""
    if tensor.constant is not None:
        return tensor.constant.tolist()
    if tensor.is_cuda:
        waited()
    return np.ones(tensor.shape, int).tolist()


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Whether `pin` was told of the tensor."""
    return getattr(tensor, "_is_pinned_here", False)


class Memory(TorchDispatchMode):
    """Bytes of the storages on the device that are alive, each counted once, whoever views it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self._alive: dict[int, Any] = {}
        self._changes: list[tuple[int, str]] = []
        self._before: Counter[str] = Counter()

    def begin(self) -> None:
        """Look for the peak from now on."""
        for size, where in self._changes:
            self._before[where] += size
        self._changes = []

    def peak(self) -> tuple[int, dict[str, int]]:
        """Return the most bytes since `begin`, and what they were by where they were made, largest first."""
        now = most = self._before.total()
        at = 0
        for number, (size, _) in enumerate(self._changes, start=1):
            now += size
            if now > most:
                most, at = now, number
        places = Counter(self._before)
        for size, where in self._changes[:at]:
            places[where] += size
        return most, {where: size for where, size in places.most_common() if size > 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        where = place()
        self._change(size, where)

        def gone() -> None:
            del self._alive[key]
            self._change(-size, where)

        self._alive[key] = weakref.finalize(storage, gone)

    def _change(self, size: int, where: str) -> None:
        self.now += size
        self._changes.append((size, where))
