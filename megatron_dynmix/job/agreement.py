"""What happens on one rank and all must hear of, so that none waits for one that has given up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class RankFailure(Exception):
    """Something failed on some rank; every rank raises it, with the same message."""


def first_failure(failure: str | None) -> str | None:
    """Return what went wrong on the lowest rank that has a failure to tell; None if all are well."""
    failures: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    return next((text for text in failures if text is not None), None)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Surround what may fail on a rank alone, a disk for instance: all ranks leave it well, or none does.

    Every rank must come here, and nothing inside may wait for another rank. If the block failed on any, all
    raise `RankFailure`.
    """
    caught: Exception | None = None
    text = None
    try:
        yield
    except Exception as error:  # whatever it is, the other ranks are waiting to be told
        caught, text = error, f"rank {torch.distributed.get_rank()}: {error or type(error).__name__}"
    failure = first_failure(text)
    if failure is not None:
        raise RankFailure(failure) from caught


def on_rank_0(text: str) -> str:
    """Return a message that all ranks have, on rank 0 only: once is enough."""
    return text if torch.distributed.get_rank() == 0 else ""
