"""Being asked to stop: SIGTERM and SIGUSR1, which schedulers send before they take a machine away."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_dynmix.errors import StoppedOnRequest

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this rank was asked to stop; the loop tells the other ranks and saves first."""

    asked = False
    heard: Callable[[], None] = staticmethod(lambda: None)
    """Called as the request comes, in a signal's handler: it must not wait."""

    def ask(self) -> None:
        """Do what a signal does."""
        self.asked = True
        self.heard()

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals as requests, and leave the handlers afterwards as they were."""
        with handling(lambda _: self.ask()):
            for number in STOP_SIGNALS:
                signal.siginterrupt(number, False)  # nothing that reads or writes need know of it
            yield self


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise `StoppedOnRequest` from wherever a signal comes: before training there is nothing to save."""

    def stop(number: int) -> None:
        raise StoppedOnRequest("stopped on request, before training")

    with handling(stop):
        yield


@contextmanager
def handling(act: Callable[[int], None]) -> Iterator[None]:
    """Act on the number of each stop signal, and leave the handlers afterwards as they were."""

    def handler(number: int, frame: FrameType | None) -> None:
        act(number)

    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous or signal.SIG_DFL)
