"""The process that writes a rank's part of a checkpoint."""

import multiprocessing
import os
import signal
import time

import pytest

from megatron_dynmix import platform


@pytest.fixture(scope="module")
def shards():
    platform.start()
    from megatron_dynmix.checkpoint import shards

    return shards


def test_a_writer_that_is_interrupted_says_nothing(shards, monkeypatch, capfd):
    context = multiprocessing.get_context("fork")
    writing = context.Event()

    def write(*_):
        writing.set()
        time.sleep(60)

    monkeypatch.setattr(shards, "_write_bucket", write)
    mailboxes = (shards.Mailbox(), shards.Mailbox())
    writer = context.Process(target=shards._write_and_hash, args=([], mailboxes[0], 0, [None], mailboxes[1]))
    writer.start()
    assert writing.wait(30)
    os.kill(writer.pid, signal.SIGINT)  # a terminal's Ctrl-C comes to the rank and to all that it has started
    writer.join(10)
    assert writer.exitcode == -signal.SIGINT
    assert capfd.readouterr() == ("", "")
