"""One process at a time in a place: taken at once by one of many, kept, left, taken over, lost."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_dynmix import lease as leases
from megatron_dynmix.errors import InputError, StoppedOnRequest
from megatron_dynmix.lease import LOCK, Lease, LeaseLost, as_long_as_it_takes, for_one_that_ends

HOLD = """
import sys, time
from pathlib import Path
from megatron_dynmix.lease import Lease
with Lease(Path(sys.argv[1]), "a run", "go elsewhere").take() as lease:
    print("held", flush=True)
    sys.stdin.readline()
    lease.say_ending()
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Patience that a test has; the beat of a holder stays well below it."""
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(leases, "GLANCE_SECONDS", 0.5)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.02)


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "run" / LOCK


def lease(lock):
    return Lease(lock, "a run", "give another --run-dir")


class Other:
    """A process that holds a place until it is told to leave it."""

    def __init__(self, lock):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout.readline() == "held\n"

    def next(self):
        """First it says that it is ending, then it ends."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def other(lock):
    started = Other(lock)
    yield started
    started.process.kill()
    started.process.communicate()


def edit(lock, **changes):
    """Write other values into a lock, as a process elsewhere would have them."""
    lock.write_text(json.dumps({**json.loads(lock.read_text()), **changes}))


def left_behind(lock, content="", **changes):
    """A lock that nobody touches any more."""
    with lease(lock).take():
        text = content or lock.read_text()
    lock.write_text(text)
    if changes:
        edit(lock, **changes)


class Touched:
    """Touches a lock as a holder on another host does."""

    def __init__(self, lock):
        self.lock, self.over = lock, threading.Event()
        self.thread = threading.Thread(target=self.beat)

    def beat(self):
        while not self.over.wait(0.05):
            os.utime(self.lock)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def test_a_place_is_free_again_and_nothing_is_left(lock):
    for _ in range(2):
        with lease(lock).take() as held:
            held.check()
            assert lock.exists()
        assert list(lock.parent.iterdir()) == []


def test_of_many_that_come_at_once_one_has_the_place(lock):
    """All at one barrier, again and again; each that fails names the one that does not."""
    tries, lock_of = 8, [lock.with_name(f".lock{number}") for number in range(20)]
    barrier, wrong = threading.Barrier(tries), []

    def come():
        for path in lock_of:
            barrier.wait()
            try:
                held.append(lease(path).take())
            except InputError as refusal:
                refused.append(str(refusal))
            barrier.wait()
            if (len(held), len(refused)) != (1, tries - 1):
                wrong.append((path, len(held), refused))
            barrier.wait()
            if threads[0] is threading.current_thread():
                held.pop().__exit__(None, None, None)
                refused.clear()

    held, refused = [], []
    threads = [threading.Thread(target=come) for _ in range(tries)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


def test_the_second_is_told_who_is_there(lock, other):
    for ask in (lambda: lease(lock).take(), lambda: lease(lock).refuse_if_held()):
        with pytest.raises(InputError) as refusal:
            ask()
        text = str(refusal.value)
        who = f"a run (pid {other.process.pid} on host {os.uname().nodename}, since 20"
        assert f"{lock.parent} is in use by {who}" in text
        assert "give another --run-dir" in text


def test_a_frozen_holder_on_this_host_is_there(lock, other):
    os.kill(other.process.pid, 19)
    time.sleep(1)
    with pytest.raises(InputError, match=f"pid {other.process.pid}"):
        lease(lock).take()


def test_a_killed_holder_on_this_host_is_known_at_once(lock, other, monkeypatch):
    monkeypatch.setattr(leases, "STALE_SECONDS", 1e9)
    other.process.kill()  # and is not waited for: a zombie is no more alive
    wait_until(lambda: leases._started(other.process.pid) == -1)
    said, start = [], time.monotonic()
    lease(lock).refuse_if_held()
    with lease(lock).take(say=said.append) as held:
        held.check()
    assert time.monotonic() - start < 1
    assert said == [
        f"{lock} was left by a run (pid {other.process.pid} on host {os.uname().nodename}, since "
        f"{said[0].split('since ')[1].split(')')[0]}): its process has ended; it is taken over"
    ]


def test_a_process_that_was_given_the_number_of_the_holder_is_not_the_holder(lock):
    left_behind(lock, started=1, pid=os.getppid())
    with lease(lock).take():
        pass


ELSEWHERE = [{"host": "elsewhere"}, {"pids": "another boot"}, {"pids": ""}]


@pytest.mark.parametrize("changes", ELSEWHERE)
def test_a_holder_elsewhere_is_there_while_its_lock_changes(lock, changes):
    left_behind(lock, **changes, pid=2**22 - 1)
    with Touched(lock):
        for ask in (lambda: lease(lock).take(), lambda: lease(lock).refuse_if_held()):
            with pytest.raises(InputError, match=f"pid {2**22 - 1} on host"):
                ask()


@pytest.mark.parametrize("changes", ELSEWHERE)
def test_a_holder_elsewhere_whose_lock_changes_no_more_is_gone(lock, changes):
    """Whatever its clock says: a lock of the future is as old as one of the past."""
    left_behind(lock, **changes, pid=os.getpid())
    os.utime(lock, (4e9, 4e9))
    said = []
    lease(lock).refuse_if_held()
    start = time.monotonic()
    with lease(lock).take(say=said.append) as held:
        assert time.monotonic() - start > 0.6
        held.check()
    assert "to see within 0.6 s whether its holder is there" in said[0]
    assert "its lock has not changed for 0.6 s; it is taken over" in said[1]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"pid": 1}', "\0" * 1024, "ÿ"])
def test_a_lock_that_says_nothing_is_watched(lock, content):
    left_behind(lock, content or " ")
    lock.write_text(content)
    with Touched(lock), pytest.raises(InputError, match="in use by something that cannot be told from it"):
        lease(lock).take()
    with lease(lock).take() as held:
        held.check()


def test_a_place_that_cannot_be_used_is_told_as_the_system_does(lock, tmp_path):
    lock.mkdir(parents=True)
    (tmp_path / "file").touch()
    lease(lock).refuse_if_held()
    with pytest.raises(IsADirectoryError):
        lease(lock).take()
    with pytest.raises(FileExistsError):
        lease(tmp_path / "file" / LOCK).take()
    with pytest.raises(FileNotFoundError):
        lease(Path("/proc") / LOCK).take()


def test_a_holder_that_ends_is_waited_for(lock, other):
    told, said = [], []

    def idle():
        told.append(True)
        if len(told) == 5:
            other.next()

    other.next()
    wait_until(lambda: json.loads(lock.read_text())["ending"])
    lease(lock).refuse_if_held()
    with lease(lock).take(patience=for_one_that_ends, idle=idle, say=said.append):
        assert len(told) >= 5
    assert len(said) == 1 and "until its holder is done, at most 300 s" in said[0]


def test_a_holder_that_ends_is_waited_for_so_long_and_then_the_job_is_to_be_queued_again(
    lock, other, monkeypatch
):
    monkeypatch.setattr(leases, "ENDING_SECONDS", 0.3)
    other.next()
    wait_until(lambda: json.loads(lock.read_text())["ending"])
    with pytest.raises(StoppedOnRequest, match=r"still holds .* after 0.3 s; run the same command again"):
        lease(lock).take(patience=for_one_that_ends)
    with pytest.raises(InputError, match="in use by"):
        lease(lock).take()  # what does not resume has nothing to wait for


def test_some_wait_as_long_as_it_takes(lock, other):
    threading.Timer(0.5, lambda: (other.next(), other.next())).start()
    with lease(lock).take(patience=as_long_as_it_takes):
        pass


def other_content(lock):
    edit(lock, token="of another", pid=77, host="node7")


def other_file(lock):
    newer = lock.parent.with_name("elsewhere") / LOCK
    left_behind(newer, host="node7", pid=77)
    newer.replace(lock)


@pytest.mark.parametrize(
    "loss, said",
    [
        (other_content, "has been taken over by a run (pid 77 on host node7"),
        (other_file, "has been taken over by a run (pid 77 on host node7"),
        (lambda lock: lock.unlink(), "is gone or holds something else"),
        (lambda lock: lock.write_text(""), "is gone or holds something else"),
    ],
)
def test_a_holder_that_loses_its_place_finds_out_by_itself_and_leaves_what_is_there(lock, loss, said):
    lost = threading.Event()
    with lease(lock).take() as held:
        held.when_lost = lost.set
        loss(lock)
        after = lock.read_bytes() if lock.exists() else None
        assert lost.wait(5)
        with pytest.raises(LeaseLost) as error:
            held.check()
        assert said in str(error.value) and f"nothing more is written to {lock.parent}" in str(error.value)
        changed = lock.stat().st_mtime_ns if lock.exists() else None
        time.sleep(0.3)
    assert after == (lock.read_bytes() if lock.exists() else None)
    assert changed == (lock.stat().st_mtime_ns if lock.exists() else None)


def test_a_lock_that_is_moved_for_a_moment_is_not_lost(lock):
    with lease(lock).take() as held:
        lock.rename(lock.with_name("moved"))
        threading.Timer(0.05, lambda: lock.with_name("moved").rename(lock)).start()
        held.check()


def test_a_lock_that_was_judged_and_is_another_by_now_is_put_back(lock):
    left_behind(lock, host="elsewhere")
    judged = leases._Seen.at(lock)
    lock.unlink()
    with lease(lock).take() as newer:
        assert not lease(lock)._take_away(judged)
        newer.check()
    assert list(lock.parent.iterdir()) == []


def wait_until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
