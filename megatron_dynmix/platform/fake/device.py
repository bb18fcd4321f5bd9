"""Stand-ins that let a training iteration run on fake CUDA tensors, in a process that `process` has started.

Shapes, types, devices, arguments and names are those of a GPU; kernels are not run. Experts get equal shares
of the tokens, and other ranks answer what this one says.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_dynmix import platform
from megatron_dynmix.errors import InputError
from megatron_dynmix.platform import packages
from megatron_dynmix.platform.fake import engine, observe
from megatron_dynmix.platform.fake.observe import FakeDevice

HOPPER = types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="NVIDIA H100"
)


def install(*, transformer_engine: bool, rank: int, world_size: int) -> None:
    """Put all stand-ins in place. To be called once, before Megatron-Core is imported."""
    import torch._dynamo as dynamo

    dynamo.config.disable = True
    _stand_in_for_cuda()
    _stand_in_for_tensors()
    if transformer_engine:
        engine.install()
    else:
        packages.hide("transformer_engine")
    _stand_in_for_ranks(rank, world_size)
    _stand_in_for_megatron()
    platform.rows_of_experts = _rows_of_experts


def _stand_in_for_cuda() -> None:
    cuda, state = torch.cuda, torch.zeros(1, dtype=torch.uint8)
    cuda._lazy_init = lambda: None  # it asks for more than the library has
    cuda.current_device = lambda: 0
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
    cuda.get_rng_state = lambda device="cuda": state
    cuda.set_rng_state = lambda state, device="cuda": None
    cuda.get_device_properties = lambda device=None: HOPPER
    cuda.get_device_capability = lambda device=None: (HOPPER.major, HOPPER.minor)
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    cuda.synchronize = lambda device=None: observe.waited()
    for kind in (cuda.Stream, cuda.Event):
        kind.synchronize = lambda self: observe.waited()


def _stand_in_for_tensors() -> None:
    FakeTensor.tolist = observe.tolist
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = observe.pin, observe.is_pinned
    torch.nn.Module._apply = _apply
    plain_type, plain_tensor = torch.Tensor.type, torch.tensor

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        on_device = isinstance(answer, str) and self.is_cuda and "cuda" not in answer
        return answer.replace("torch.", "torch.cuda.", 1) if on_device else answer

    def tensor(data: Any, *args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = plain_tensor(_plain(data), *args, **kwargs)
        if pin_memory:
            return observe.pin(made)
        return made if device is None else made.to(torch.device(device))

    torch.Tensor.type, torch.tensor = type_, tensor


def _plain(data: Any) -> Any:
    """Replace tensors in lists by numbers: what `torch.tensor` would wait for one by one."""
    if isinstance(data, list | tuple):
        return type(data)(map(_plain, data))
    return data.item() if isinstance(data, Tensor) else data


def _apply(
    self: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> torch.nn.Module:
    """Move or cast a module in place: torch would swap fake parameters for others, and cannot."""
    for child in self.children() if recurse else ():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            moved = function(parameter.detach())
        if (moved.device, moved.dtype) != (parameter.device, parameter.dtype):
            made = torch.nn.Parameter(moved, parameter.requires_grad)
            vars(made).update({key: value for key, value in vars(parameter).items() if key not in vars(made)})
            self._parameters[name] = made
    self._buffers.update({name: function(b) for name, b in self._buffers.items() if b is not None})
    return self


def _stand_in_for_ranks(rank: int, world_size: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = torch.distributed
    ranks.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    new_group = ranks.new_group

    def fake_group(*args: Any, backend: Any = None, pg_options: Any = None, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs)

    def everybody_says(answers: list[Any], mine: Any, group: Any = None) -> None:
        answers[:] = [mine] * len(answers)

    ranks.new_group = ranks.distributed_c10d.new_group = fake_group
    ranks.all_gather_object = ranks.distributed_c10d.all_gather_object = everybody_says


def _stand_in_for_megatron() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    @contextlib.contextmanager
    def coalescing(*_: Any, **__: Any) -> Iterator[Any]:
        yield types.SimpleNamespace(wait=lambda *_: True)

    buffers._coalescing_manager = coalescing
    random._get_cuda_rng_state = lambda *_, **__: torch.zeros(1, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None
    kind = dispatcher.MoEAlltoAllTokenDispatcher
    kind.preprocess = _in_equal_shares(kind.preprocess)
    permute = dispatcher.permute

    def permute_known(*args: Any, **kwargs: Any) -> Any:
        """Say how many rows of experts the mask selects, which a fake one cannot."""
        FakeDevice.selected = kwargs["num_out_tokens"]
        return permute(*args, **kwargs)

    dispatcher.permute = permute_known
    for name in ("MoEAllGatherTokenDispatcher", "MoEFlexTokenDispatcher"):
        getattr(dispatcher, name).__init__ = _refuse


def _refuse(*_: Any, **__: Any) -> None:
    raise InputError("how many rows it gets, only moe_token_dispatcher_type alltoall tells without values")


def _equal_shares(rows: int, experts: int) -> NDArray[np.int64]:
    return np.diff(np.linspace(0, rows, experts + 1).astype(int))


def _rows_of_experts(counts_E: Tensor, rows: int) -> list[int]:
    observe.waited()
    return _equal_shares(rows, len(counts_E)).tolist()


def _in_equal_shares(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Have every expert get its equal share of the tokens, where values would say how many."""

    def shared(self: Any, routing_map: Tensor) -> Any:
        tokens_per_expert = preprocess(self, routing_map)
        if self.drop_and_pad:
            return tokens_per_expert
        self.num_out_tokens = len(routing_map) * self.config.moe_router_topk
        sent_RE = _equal_shares(self.num_out_tokens, self.num_experts).reshape(self.ep_size, -1)
        mine_E = sent_RE[torch.distributed.get_rank(self.ep_group)]
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = sent_RE.sum(axis=1)
            self.output_splits = np.full(self.ep_size, mine_E.sum())
            self.output_splits_tp = np.full(self.tp_size, mine_E.sum() * self.ep_size)
        if self.num_local_experts > 1 and not self.config.moe_permute_fusion:
            self.num_global_tokens_per_local_expert = np.tile(mine_E, (self.tp_size * self.ep_size, 1))
        return mine_E * self.ep_size * self.tp_size

    return shared
