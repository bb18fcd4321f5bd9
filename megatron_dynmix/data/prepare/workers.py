"""Work shared out to processes, with results in the order of what was given in."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, TypeVar

from megatron_dynmix.errors import CommandFailed

Given = TypeVar("Given")
Result = TypeVar("Result")

_THREADS = "TOKENIZERS_PARALLELISM"
_WAITING_PER_WORKER = 2
_function: Callable[[Any], Any]


def available_cores() -> int:
    """Cores that this process may use, which a scheduler may have cut down."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    function: Callable[[Given], Result], items: Iterable[Given], workers: int, preload: str
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for each item, in order, whichever worker is done first.

    With one worker everything happens in this process. With more, each gets a copy of ``function``
    once; a few items per worker are under way at a time, so memory does not grow with their number.
    When the iterator is closed, at an error or an interrupt no process is left behind, nor when this
    process is killed. ``function`` and its results can be pickled; ``preload`` is the module that the
    workers need, imported once for all of them. A worker that dies is a CommandFailed.
    """
    if workers == 1:
        with one_tokenizer_thread():
            yield from map(function, items)
        return
    # Not fork: libraries here have threads, whose locks a forked copy would inherit for ever.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(function,))
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > workers * _WAITING_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise CommandFailed(
            "a worker process died before it was done, killed as a rule for want of memory; use fewer "
            "--workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_tokenizer_thread() -> Iterator[None]:
    """Keep the tokenizer to one thread; processes share the cores out already."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_THREADS, None)
        else:
            os.environ[_THREADS] = before


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    os.environ[_THREADS] = "false"
    # An interrupt at the terminal reaches every process; the parent ends the workers in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a child"
    # Every worker holds both ends of the queue, so a parent that is killed closes it for none of them.
    connection.wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
