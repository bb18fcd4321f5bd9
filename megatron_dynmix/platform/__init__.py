"""Where we run: CUDA with NCCL, or CPU with gloo.

This is the only place of the project that asks. `start` must run before the first import of
`megatron.core`, in every process; on a host without CUDA it installs the stand-ins of `cpu.py`, on a
host with CUDA it only completes Megatron-Core where Transformer Engine cannot be used.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch

from megatron_dynmix.errors import InputError
from megatron_dynmix.platform import packages, versions


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What this process computes on."""

    device: torch.device
    """Device of this rank's tensors."""
    backend: str
    """Backend of `torch.distributed`: `nccl` or `gloo`."""
    transformer_engine: bool
    """Whether Transformer Engine layers are used; without them Megatron-Core's local layers are."""
    transformer_engine_error: str = ""
    """Why it is not used though it is installed, and the remedy."""

    @property
    def pin_memory(self) -> bool:
        """Whether batches are to be put where a copy to the device is fastest."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that a clock reads true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@functools.cache  # the stand-ins are process-wide, so is the decision
def start() -> Platform:
    """Decide once per process, and on CPU install the stand-ins; later calls return the same platform."""
    # what Megatron-Core makes every run say: what is not installed, and names torch has renamed
    for message in (
        ".*Falling back to",
        ".*is deprecated. Please use",
        "full scope is deprecated",
        "moe_ffn_hidden_size is not set",
        "The .grad attribute of a Tensor that is not a leaf",
    ):
        warnings.filterwarnings("ignore", message=message)
    versions.expect_deprecations()
    return _cuda() if torch.cuda.is_available() else _cpu()


def rows_of_experts(counts_E: torch.Tensor, rows: int) -> list[int]:
    """Read on the host how many of so many rows are each expert's; this waits for the device once."""
    counts: list[int] = counts_E.tolist()
    assert sum(counts) == rows, (counts, rows)
    return counts


def most_ranks(wanted: int) -> int:
    """Return how many of so many ranks this machine can start: with CUDA, one on each device."""
    return min(wanted, torch.cuda.device_count()) if start().device.type == "cuda" else wanted


def _cuda() -> Platform:
    local_rank, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if visible == 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        local_rank = 0  # srun may show each task its own device only
    if local_rank >= visible:
        raise InputError(
            f"local rank {local_rank} has no device: {visible} can be seen here; start at most {visible} "
            "ranks on this machine"
        )
    device = torch.device("cuda", local_rank)
    with_te, te_error = packages.is_usable("transformer_engine"), packages.transformer_engine_error()
    packages.hide_broken()
    if not with_te:
        _complete_megatron()
    return Platform(
        device=device, backend="nccl", transformer_engine=with_te, transformer_engine_error=te_error
    )


def _cpu() -> Platform:
    from megatron_dynmix.platform import cpu

    _expect_no_cuda()  # before anything imports Megatron-Core or transformers: the line comes once, at import
    packages.hide("transformer_engine")  # nothing of it runs on a CPU, whether it can be imported or not
    cpu.install()
    _complete_megatron()
    return Platform(device=torch.device("cpu"), backend="gloo", transformer_engine=False)


def _complete_megatron() -> None:
    from megatron_dynmix.platform import megatron_patches

    megatron_patches.complete_without_transformer_engine()


def _expect_no_cuda() -> None:
    """Drop the warning of torch's CUDA build that a host with a CUDA compiler has no device.

    `torch.utils.cpp_extension` looks for a compiler when it is imported, and Megatron-Core imports it.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: not record.getMessage().startswith("No CUDA runtime is found")
    )


def rendezvous(timeout_minutes: float) -> torch.distributed.Store:
    """Return the store where the ranks of `torchrun`'s variables meet; a private one for a rank alone.

    It does not wait for the other ranks, so that who is missing can be said. What takes longer than the
    timeout, to reach it or to get an answer, raises DistError.
    """
    if torch.distributed.is_initialized():
        return torch.distributed.distributed_c10d._get_default_store()
    if "RANK" not in os.environ:
        return torch.distributed.HashStore()
    hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=os.environ["RANK"] == "0" and not hosted_by_launcher,
        timeout=timedelta(minutes=timeout_minutes),
        wait_for_workers=False,
        multi_tenant=True,
    )


def init_process_group(timeout_minutes: float, store: torch.distributed.Store | None = None) -> None:
    """Join the job that `torchrun`'s variables describe; alone, if there are none.

    A collective waits so long for the other ranks; `store` is where they have met, if they have.
    """
    if torch.distributed.is_initialized():
        return
    platform = start()
    device: dict[str, torch.device] = {}
    if platform.device.type == "cuda":
        torch.cuda.set_device(platform.device)
        device["device_id"] = platform.device  # NCCL connects at once, and does not guess a rank's device
    torch.distributed.init_process_group(
        platform.backend,
        **device,
        timeout=timedelta(minutes=timeout_minutes),
        store=store or rendezvous(timeout_minutes),
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1,
    )
