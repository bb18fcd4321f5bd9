"""How the ranks of a job find one another.

torchrun starts failed ranks again in the same store, where the last attempt has left its addresses: rank 0
opens a new part of it for each attempt, and the others come until it has seen them there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta

import torch

from megatron_dynmix import platform
from megatron_dynmix.errors import TrainingStopped

POLL_SECONDS = 1.0
NAMED = 8
"""Ranks that one message names."""


def meet(timeout_minutes: float) -> torch.distributed.Store:
    """Wait until every rank of the job is there.

    Args:
        timeout_minutes: how long.

    Returns:
        The part of the job's store that belongs to this attempt.

    Raises:
        TrainingStopped: the store cannot be reached, or ranks are missing; the first to give up says which.

    """
    if torch.distributed.is_initialized():
        return torch.distributed.distributed_c10d._get_default_store()
    deadline = time.monotonic() + 60 * timeout_minutes
    store = _reach_store(timeout_minutes)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if rank == 0:
            return _receive(store, world_size, deadline)
        return _come(store, rank, deadline)
    except torch.distributed.DistError:
        raise TrainingStopped(_absent(store, world_size, timeout_minutes)) from None


def _receive(store: torch.distributed.Store, world_size: int, deadline: float) -> torch.distributed.Store:
    """Rank 0: open a new part of the store, and tell the ranks that came that all are there."""
    attempt = uuid.uuid4().hex
    here = torch.distributed.PrefixStore(attempt, store)
    store.set("attempt", attempt)
    keys = [f"came/{rank}" for rank in range(1, world_size)]
    while keys and not here.check(keys):  # a wait in the store would not hear of signals
        if time.monotonic() > deadline:
            raise torch.distributed.DistStoreError("not all ranks have come")
        time.sleep(POLL_SECONDS / 10)
    if keys:
        here.set("all", json.dumps([card.decode() for card in here.multi_get(keys)]))
    return here


def _come(store: torch.distributed.Store, rank: int, deadline: float) -> torch.distributed.Store:
    """Another rank: leave a card in the newest part of the store until rank 0 has read it."""
    card, patience = uuid.uuid4().hex, timedelta(seconds=POLL_SECONDS)
    while True:
        with contextlib.suppress(torch.distributed.DistStoreError):  # nothing there within our patience
            store.wait(["attempt"], patience)
            here = torch.distributed.PrefixStore(store.get("attempt").decode(), store)
            here.set(f"came/{rank}", card)
            here.wait(["all"], patience)
            if card in json.loads(here.get("all")):
                return here
            time.sleep(POLL_SECONDS)  # all were there in an attempt that is over
        if time.monotonic() > deadline:
            raise torch.distributed.DistStoreError("rank 0 has not seen all ranks")


def _absent(store: torch.distributed.Store, world_size: int, timeout_minutes: float) -> str:
    """Which ranks have not come, on the first rank that asks."""
    missing = ["0"]
    with contextlib.suppress(torch.distributed.DistError):
        if store.check(["attempt"]):
            here = torch.distributed.PrefixStore(store.get("attempt").decode(), store)
            if here.add("asked", 1) > 1:
                if os.environ.get("RANK") == "0":
                    time.sleep(POLL_SECONDS)  # the store may live in this process: the first is reading
                return ""
            others = [rank for rank in range(1, world_size) if not here.check([f"came/{rank}"])]
            missing = list(map(str, others)) or missing
    return (
        f"{len(missing)} of {world_size} ranks did not come to {store_address()} within {timeout_minutes:g} "
        f"minutes: rank {shortened(missing)}. Look at what they or their hosts said; "
        "--distributed-timeout-minutes sets how long to wait"
    )


def _reach_store(timeout_minutes: float) -> torch.distributed.Store:
    try:
        if os.environ.get("RANK", "0") != "0":
            _wait_for_host(60 * timeout_minutes)  # torch would report each attempt with its stack
        return platform.rendezvous(timeout_minutes)
    except (OSError, torch.distributed.DistError) as error:
        raise TrainingStopped(
            f"{socket.gethostname()} cannot reach {store_address()}, where the ranks meet, within "
            f"{timeout_minutes:g} minutes: {error}. Check MASTER_ADDR and MASTER_PORT, and whether rank 0 "
            "runs there"
        ) from None


def _wait_for_host(seconds: float) -> None:
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(place, timeout=max(deadline - time.monotonic(), 0.1)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS / 2)


def store_address() -> str:
    """Where the ranks meet."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def shortened(names: Sequence[str]) -> str:
    """Names in a row, no more than one can read."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
