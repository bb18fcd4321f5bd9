"""Stand-ins that let Megatron-Core 0.16.1 run on CPU tensors over gloo. Installed on hosts without CUDA only.

Everything replaced here raises without CUDA (or, for `Tensor.type`, gives an answer Megatron-Core
refuses, or, for `torch.compile`, takes minutes), so nothing that works on such a host changes its meaning.
Four groups:

* `torch.compile`: nothing is compiled;
* `torch.cuda`: streams and events that are always done, one device, the CPU's random generator;
* tensor factories: `device="cuda"` means the CPU;
* Megatron-Core: its random-state tracker, and two gloo limits (list-valued split sizes, even gathers).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

from megatron_dynmix.platform import versions

CPU = torch.device("cpu")


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """Wait for nothing: on a CPU, work is done when the call returns."""


class Idle:
    """The one stream of a CPU, always idle; and an event, which has already happened."""

    __init__ = record = wait = synchronize = wait_stream = wait_event = __exit__ = _nothing

    def record_event(self, event: Idle | None = None) -> Idle:
        """Return an event that has happened."""
        return event or Idle()

    def __enter__(self) -> Idle:
        return self


def install() -> None:
    """Put all stand-ins in place. To be called once, before Megatron-Core is imported."""
    torch.compile = uncompiled
    _replace_torch_cuda()
    _redirect_tensor_factories()
    _adapt_megatron_to_gloo()
    versions.recompute_without_compiler()


def uncompiled(model: Any = None, **options: Any) -> Any:
    """Take the place of `torch.compile`, as a function and as a decorator, and leave all as it is.

    Megatron-Core compiles small functions: minutes of g++ for nothing. Only to load the compiler takes longer
    than all of Megatron-Core.
    """
    return (lambda later: later) if model is None else model


def _replace_torch_cuda() -> None:
    cuda, stream = torch.cuda, Idle()
    cuda.Stream = cuda.Event = Idle
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda device=None: None
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    # torch.manual_seed would also queue the seed, with its stack, for a CUDA that never comes
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if str(device).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return call


def _redirect_tensor_factories() -> None:
    # A TorchFunctionMode would be tidier, but it is off inside backward().
    # `with torch.device(...)` knows the factories by identity, from the first time it is asked: ask before
    # they are wrapped, or models that are built on the meta device are built on the CPU.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    tensor_type = torch.Tensor.type

    def type_for_megatron(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        # The optimizer compares the answer with 'torch.cuda.FloatTensor'; nobody else may be misled.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_for_megatron


def _adapt_megatron_to_gloo() -> None:
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    logging.getLogger(megatron_random.__name__).addFilter(
        # The tracker warns that the CPU generator moved inside a CUDA context: here they are one.
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    mappings._gather_along_first_dim = _gather_uneven(mappings._gather_along_first_dim)


def _gather_uneven(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Gloo gathers equal sizes only: pad to the largest, gather, cut."""

    def gather_along_first_dim(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    return gather_along_first_dim
