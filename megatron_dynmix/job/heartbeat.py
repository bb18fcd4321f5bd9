"""How the ranks of a job are: each says so once a second, and is asked when a collective has failed.

A rank whose process is gone or frozen says nothing more; one that hangs in a computation or waits for another
still does, but its iteration stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from megatron_dynmix.errors import TrainingStopped
from megatron_dynmix.job.meeting import meet, shortened, store_address

BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 3.0
"""A rank that has said nothing for so long is gone."""
ANSWER_SECONDS = 15.0
"""How long the store may take to answer everything; it does not say when its host has gone."""

Answer = TypeVar("Answer")
Ranks = dict[int, dict[str, Any]]


@contextlib.contextmanager
def heartbeat_of_job(timeout_minutes: float) -> Iterator[Heartbeat]:
    """Meet the other ranks, and around all that waits for them find out who is missing when it fails.

    Raises:
        TrainingStopped: ranks could not reach one another any more; one of them says which are gone.

    """
    store = meet(timeout_minutes)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    heartbeat = Heartbeat(store, rank, world_size)
    try:
        yield heartbeat
    except BaseException as error:
        if not _is_of_another_rank(error):
            heartbeat.end("failed")
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
        self._fall_silent(state)
        _bounded(self._post)

    def explain(self) -> str:
        """Who made a collective fail: one message of the whole job.

        Returns:
            The message, where this rank is the first to ask; otherwise nothing.

        """
        self._fall_silent("waiting")
        found = _bounded(self._look)
        if found is None:
            return (
                f"{store_address()}, where the ranks meet, does not answer: its host or the network is gone"
            )
        first, before, after = found
        if not first:
            return ""
        return describe(before, after, self._world_size)

    def _fall_silent(self, state: str) -> None:
        self._ended.set()
        self._state = state

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
        """Whether this rank is the first to ask, and what was said before and after some patience."""
        self._post()
        if self._store.add("heartbeat/asked", 1) > 1:
            if self._rank == 0:
                time.sleep(2 * PATIENCE_SECONDS)  # the store may live in this process: the first is reading
            return False, {}, {}
        before = self._said()
        time.sleep(PATIENCE_SECONDS)
        return True, before, self._said()

    def _said(self) -> Ranks:
        came = [rank for rank in range(self._world_size) if self._store.check([_key(rank)])]
        return dict(
            zip(came, map(json.loads, self._store.multi_get([_key(rank) for rank in came])), strict=True)
        )


def describe(before: Ranks, after: Ranks, world_size: int) -> str:
    """One message of what the ranks said, twice, some seconds apart."""
    newest = max(said["iteration"] for said in after.values())
    silent = {
        rank: said
        for rank, said in after.items()
        if said["state"] == "running" and rank in before and said["beats"] == before[rank]["beats"]
    }
    failed = {rank: said for rank, said in after.items() if said["state"] == "failed"}
    behind = {
        rank: said
        for rank, said in after.items()
        if said["iteration"] < newest and rank not in silent and rank not in failed
    }
    parts = [f"{_names(failed)} failed with a message of {_own(failed)} own" if failed else ""]
    parts += [f"{_names(silent)} {_is(silent)} gone or frozen" if silent else ""]
    parts += [f"{_names(behind)} {_is(behind)} behind" if behind else ""]
    text = "; ".join(part for part in parts if part)
    return (
        text
        or f"all {world_size} ranks are there and in the same iteration: look at the network between them"
    )


def _names(ranks: Ranks) -> str:
    """Ranks with all that helps to find them, and no more than one can read."""
    listed = [
        f"rank {rank} ({said['host']}, local rank {said['local_rank']}, pid {said['pid']}, "
        f"last heard in iteration {said['iteration']})"
        for rank, said in ranks.items()
    ]
    return shortened(listed)


def _is(ranks: Ranks) -> str:
    return "is" if len(ranks) == 1 else "are"


def _own(ranks: Ranks) -> str:
    return "its" if len(ranks) == 1 else "their"


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _bounded(ask: Callable[[], Answer]) -> Answer | None:
    """The answer, or None if the store fails or is silent: a cut link makes it wait for ever."""
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
    """Whether an error, or one that led to it, says that ranks could not talk to one another."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.distributed.DistError) or "/gloo/" in str(seen):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False
