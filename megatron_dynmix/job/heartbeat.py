"""How the ranks of a job find one another, and who of them is missing when a collective fails.

torchrun starts failed ranks again in the same store, where the last attempt has left its addresses: rank 0
opens a new part of it for each attempt, and the others come until it has seen them there. (torchrun's own
TORCHELASTIC_RESTART_COUNT cannot name the attempt: it counts only what has failed on the rank's own host.)

Each rank then says once a second how it is. One whose process is gone or frozen says nothing more; one that
hangs in a computation or waits for another still does, but its iteration stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch

from megatron_dynmix import platform
from megatron_dynmix.errors import CommandFailed, InputError, StoppedOnRequest, TrainingStopped
from megatron_dynmix.job.resources import exhausted

POLL_SECONDS = 1.0
BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 3.0
"""A rank that has said nothing for so long is gone."""
ANSWER_SECONDS = 15.0
"""How long the store may take to answer everything; it does not say when its host has gone."""
NAMED = 8
"""Ranks that one message names."""

TOLD = (CommandFailed, InputError, StoppedOnRequest, TrainingStopped, KeyboardInterrupt)
"""What has a message of its own."""

Answer = TypeVar("Answer")
Ranks = dict[int, dict[str, Any]]
"""What each rank said last."""


def meet(timeout_minutes: float) -> torch.distributed.Store:
    """Wait until every rank of the job is there; return the part of the store that belongs to this attempt.

    `TrainingStopped`: it cannot be reached, or ranks are missing; the first to give up says which.
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
    """Say which ranks have not come, on the first rank that asks."""
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
        f"{len(missing)} of {world_size} ranks did not come to {_address()} within {timeout_minutes:g} "
        f"minutes: rank {_shortened(missing)}. Look at what they or their hosts said; "
        "--distributed-timeout-minutes sets how long to wait"
    )


def _reach_store(timeout_minutes: float) -> torch.distributed.Store:
    try:
        if os.environ.get("RANK", "0") != "0":
            _wait_for_host(60 * timeout_minutes)  # torch would report each attempt with its stack
        return platform.rendezvous(timeout_minutes)
    except (OSError, torch.distributed.DistError) as error:
        raise TrainingStopped(
            f"{socket.gethostname()} cannot reach {_address()}, where the ranks meet, within "
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


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


@contextlib.contextmanager
def heartbeat_of_job(timeout_minutes: float) -> Iterator[Heartbeat]:
    """Meet the other ranks, and around all that waits for them find out who is missing when it fails.

    `TrainingStopped`: ranks could not reach one another any more; one of them says which are gone.
    """
    store = meet(timeout_minutes)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    heartbeat = Heartbeat(store, rank, world_size)
    try:
        yield heartbeat
    except BaseException as error:
        used_up = None if isinstance(error, TOLD) else exhausted(error)
        if used_up or not _is_of_another_rank(error):
            heartbeat.end("failed")
            if used_up:
                again = "go on from the last checkpoint with --resume auto"
                raise TrainingStopped(f"{used_up}; {again}" if heartbeat.is_first() else "") from error
            raise
        who = heartbeat.explain()
        text = (
            f"iteration {heartbeat.iteration} could not be finished: {who}. Collectives wait "
            f"{timeout_minutes:g} minutes (--distributed-timeout-minutes); go on from the last checkpoint "
            f"with --resume auto ({str(error).splitlines()[0]})"
        )
        raise TrainingStopped(text if who else "") from error
    heartbeat.end("done")


class Heartbeat:
    """What this rank says of itself in the job's store, and what the others said."""

    def __init__(self, store: torch.distributed.Store, rank: int, world_size: int) -> None:
        self.iteration = 0
        """The iteration this rank is in; the loop sets it, and that is all a step pays."""
        self.store = store
        """Where the ranks of the job meet."""
        self._store = store.clone()  # a connection of its own: requests on one wait for one another
        self._rank, self._world_size = rank, world_size
        self._state = "running"
        self._beats = 0
        self._ended = threading.Event()
        self._post()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def end(self, state: str) -> None:
        """Say for the last time how this rank is, as far as the store can still be reached."""
        self._ended.set()
        self._state = state
        _bounded(self._post)

    def explain(self) -> str:
        """Say who made a collective fail, if this rank is the first to ask: one message of the whole job."""
        self._ended.set()
        self._state = "waiting"
        found = _bounded(self._look)
        if found is None:
            return f"{_address()}, where the ranks meet, does not answer: its host or the network is gone"
        first, before, after = found
        return describe(before, after, self._world_size) if first else ""

    def is_first(self) -> bool:
        """Whether no other rank has told what went wrong; it is told if that cannot be found out."""
        return _bounded(self._asks_first) is not False

    def _asks_first(self) -> bool:
        return bool(self._store.add("heartbeat/asked", 1) == 1)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._beats += 1
            try:
                self._post()
            except RuntimeError:  # the store is gone; a collective will fail and ask
                return

    def _post(self) -> None:
        said = {
            "host": socket.gethostname(),
            "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
            "pid": os.getpid(),
            "iteration": self.iteration,
            "beats": self._beats,
            "state": self._state,
        }
        self._store.set(_key(self._rank), json.dumps(said))

    def _look(self) -> tuple[bool, Ranks, Ranks]:
        """Return whether this rank is the first to ask, and what was said before and after some patience."""
        self._post()
        if not self._asks_first():
            if self._rank == 0:
                time.sleep(2 * PATIENCE_SECONDS)  # the store may live in this process: the first is reading
            return False, {}, {}
        before = self._said()
        time.sleep(PATIENCE_SECONDS)
        return True, before, self._said()

    def _said(self) -> Ranks:
        came = [rank for rank in range(self._world_size) if self._store.check([_key(rank)])]
        said = self._store.multi_get(list(map(_key, came)))
        return dict(zip(came, map(json.loads, said), strict=True))


def describe(before: Ranks, after: Ranks, world_size: int) -> str:
    """Make one message of what the ranks said, twice, some seconds apart."""
    newest = max(said["iteration"] for said in after.values())
    failed, silent, behind = [], [], []
    for rank, said in after.items():
        name = (
            f"rank {rank} ({said['host']}, local rank {said['local_rank']}, pid {said['pid']}, "
            f"last heard in iteration {said['iteration']})"
        )
        if said["state"] == "failed":
            failed.append(name)
        elif said["state"] == "running" and rank in before and said["beats"] == before[rank]["beats"]:
            silent.append(name)
        elif said["iteration"] < newest:
            behind.append(name)
    parts = [
        f"{_shortened(names)} {one if len(names) == 1 else several}"
        for names, one, several in (
            (failed, "failed with a message of its own", "failed with a message of their own"),
            (silent, "is gone or frozen", "are gone or frozen"),
            (behind, "is behind", "are behind"),
        )
        if names
    ]
    alike = f"all {world_size} ranks are there and in the same iteration: look at the network between them"
    return "; ".join(parts) or alike


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _bounded(ask: Callable[[], Answer]) -> Answer | None:
    """Return the answer, or None if the store fails or is silent: a cut link makes it wait forever."""
    answers: list[Answer] = []

    def run() -> None:
        try:
            answers.append(ask())
        except RuntimeError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else None


def _is_of_another_rank(error: BaseException) -> bool:
    """Return whether an error, or one that led to it, says that ranks could not talk to one another."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.distributed.DistError) or "/gloo/" in str(seen):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False
