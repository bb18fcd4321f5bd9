"""One job in a run directory: its rank 0 holds the directory, and all ranks hear whether it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dynmix.errors import InputError, StoppedOnRequest
from megatron_dynmix.job.signals import StopRequest
from megatron_dynmix.lease import LOCK, Lease, for_one_that_ends, no_patience
from megatron_dynmix.training.resume import Resume, check_run_dir

WAITING = "waiting"


def lease_of(run_dir: Path) -> Lease:
    """Return the lease of a run directory, not taken yet."""
    return Lease(run_dir / LOCK, "a run", "give another --run-dir")


@contextlib.contextmanager
def holding(run_dir: Path, resume: Resume, stop: StopRequest) -> Iterator[Lease | None]:
    """Hold a run directory while the job is in it; yield the lease on rank 0, which writes, else None.

    A run that resumes waits for one that is about to end. `InputError` on all ranks if it is held, or if what
    happened in it since the start of this job does not go with `resume`; `StoppedOnRequest` if the other has
    not ended in time, or this one is asked to. One rank says why.
    """
    if torch.distributed.get_rank() != 0:
        while (answer := _told(None)) == WAITING:
            pass
        if answer is not None:
            raise answer
        yield None
        return
    lease = lease_of(run_dir)

    def idle() -> None:
        if stop.asked:
            raise StoppedOnRequest("stopped on request, before training")
        _told(WAITING)  # or a collective of theirs would time out

    with contextlib.ExitStack() as held:
        try:
            patience = no_patience if resume == "no" else for_one_that_ends
            held.enter_context(lease.take(patience=patience, idle=idle, say=partial(print, flush=True)))
            check_run_dir(run_dir, resume)
        except (InputError, StoppedOnRequest) as refusal:
            _told(type(refusal)(""))
            raise
        except OSError as error:
            _told(InputError(""))
            raise InputError(
                f"{lease.path} cannot be made ({error.strerror}); give another --run-dir"
            ) from None
        _told(None)
        lease.when_lost, stop.heard = stop.ask, lease.say_ending
        yield lease


def _told(answer: Any) -> Any:
    """Return what rank 0 says, on every rank."""
    answers = [answer]
    torch.distributed.broadcast_object_list(answers, src=0)
    return answers[0]
