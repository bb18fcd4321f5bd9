"""Ranks for a test, forked from one process that has torch and Megatron-Core loaded.

On a GPU each is started by itself: who has asked the driver for devices cannot be forked.
"""

import contextlib
import multiprocessing
import os
import signal
import traceback
from multiprocessing.connection import Connection, wait

from megatron_dynmix import platform
from tests.ports import free_port

CUDA = platform.start().device.type == "cuda"  # a started rank, too, comes here before Megatron-Core
CONTEXT = multiprocessing.get_context("spawn" if CUDA else "forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


def run_ranks(world_size, program, *args, timeout=240, context=CONTEXT, **kwargs):
    """Call `program(*args, **kwargs)` on every rank of a fresh job; returns the answers in rank order.

    The first rank that fails ends the job, and its traceback is the test's.
    """
    with started_ranks(world_size, program, *args, context=context, **kwargs) as (processes, pipes):
        answers = _collect(pipes, timeout)
        for process in processes:
            process.join(timeout=20)
        return answers


@contextlib.contextmanager
def started_ranks(world_size, program, *args, context=CONTEXT, **kwargs):
    """The processes of a fresh job and the pipes of their answers; all are ended on leaving."""
    port = free_port()
    pipes, processes = [], []
    try:
        for rank in range(world_size):
            here, there = context.Pipe()
            job = (there, rank, world_size, port, program, args, kwargs)
            process = context.Process(target=_rank, args=job)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        yield processes, pipes
    finally:
        for process in processes:
            end_rank(process)


def end_rank(process):
    """End a rank and what it has started, the processes that write a checkpoint for instance."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)  # one that had no group of its own yet
    process.join()


def _collect(pipes: list[Connection], timeout):
    answers = {}
    while len(answers) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in answers], timeout)
        assert ready, f"no rank answered within {timeout} s"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failure, answer = pipe.recv()
            except EOFError:
                failure, answer = "died without a word", None
            assert failure is None, f"rank {rank}: {failure}"
            answers[pipe] = answer
    return [answers[pipe] for pipe in pipes]


def _rank(pipe, rank, world_size, port, program, args, kwargs):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    os.setsid()
    try:
        pipe.send((None, program(*args, **kwargs)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
