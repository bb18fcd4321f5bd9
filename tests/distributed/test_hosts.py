"""Several hosts: two network namespaces with addresses of their own, and a cable between them.

Each starts its ranks with examples/torchrun.sh.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import programs
from tests.distributed.ranks import run_ranks
from tests.distributed.test_faults import without_clock
from tests.distributed.test_launch import children_of

pytestmark = pytest.mark.alone
TRAIN = Path(__file__).parents[2] / "examples/torchrun.sh"
HOSTS = ["10.213.7.1", "10.213.7.2"]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """Two network namespaces, `names[0]` and `names[1]`, joined by a pair of virtual interfaces."""

    def __init__(self):
        self.names = [f"dynmix-{os.getpid()}-{index}" for index in range(2)]
        self.ends = [f"dm{os.getpid()}{letter}" for letter in "ab"]

    def __enter__(self):
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
            for name, end, address in zip(self.names, self.ends, HOSTS, strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        return self

    def __exit__(self, *_):
        for name in self.names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "del", name)

    def cut(self):
        """Pull the cable."""
        ip("-n", self.names[0], "link", "set", self.ends[0], "down")

    def join(self):
        """Put it back."""
        ip("-n", self.names[0], "link", "set", self.ends[0], "up")

    def train(self, index, arguments, log):
        """Start one host's ranks; what they say goes to the file."""
        environment = {
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(TRAIN.parents[1]),
            "PYTHONWARNINGS": "ignore",
            "NNODES": "2",
            "NODE_RANK": str(index),
            "MASTER_ADDR": HOSTS[0],
            "LOCAL_ADDR": HOSTS[index],
            "GPUS_PER_NODE": "2",
            "SAVE_SECONDS": "20",
            "GLOO_SOCKET_IFNAME": self.ends[index],
        }
        command = ["ip", "netns", "exec", self.names[index], str(TRAIN), *map(str, arguments)]
        with log.open("w") as said:
            return subprocess.Popen(
                command, env=environment, stdout=said, stderr=said, start_new_session=True
            )


@pytest.fixture
def hosts():
    with Hosts() as both:
        yield both


@contextlib.contextmanager
def started(hosts, arguments, logs):
    processes = [hosts.train(index, arguments, logs[index]) for index in range(2)]
    try:
        yield processes
    finally:
        for process in processes:
            for pid in [process.pid, *children_of(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def settings(start_from):
    flags = [*start_from, "--train-iters", "6", "--interval", "3", "--save-interval", "1"]
    return [*flags, "--distributed-timeout-minutes", "0.5"]


@pytest.fixture
def local(run_yaml, settings, tmp_path):
    """The same run by four ranks of this host."""
    return run_ranks(4, programs.train, run_yaml, settings, tmp_path / "local")[0]


def same(run_dir, local):
    for name, records in programs.records_of(run_dir).items():
        assert without_clock(records) == without_clock(local[name])


@pytest.mark.slow
def test_I3_two_hosts_of_two_ranks_equal_one_of_four_and_a_cut_cable_ends_both(
    hosts, local, run_yaml, settings, tmp_path
):
    run_dir, logs = tmp_path / "run", [tmp_path / "host0.log", tmp_path / "host1.log"]
    arguments = [run_yaml, "--run-dir", run_dir, *settings]
    with started(hosts, [*arguments, "--train-iters", "400", "--lr-decay-iters", "6"], logs) as processes:
        wait_for(lambda: "saved checkpoint from iteration       2" in said(logs), processes, logs, 120)
        hosts.cut()
        for process in processes:
            process.wait(timeout=150)
        assert all(process.returncode for process in processes)
    for host, log in enumerate(logs):
        messages = [line for line in log.read_text().splitlines() if "stopped: iteration" in line]
        assert messages, log.read_text()
        other = [f"rank {rank} (" for rank in range(4) if rank // 2 != host]
        lost = "does not answer: its host or the network is gone"
        assert any(name in line for line in messages for name in other) or lost in messages[0], messages
        assert "Collectives wait 0.5 minutes" in messages[0] and "--resume auto" in messages[0]
    hosts.join()
    done = int((run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert done < 6, "the cable was cut too late"
    with started(hosts, arguments, logs) as processes:
        codes = [process.wait(timeout=200) for process in processes]
    assert codes == [0, 0], said(logs)
    assert f"at iteration {done}" in said(logs)
    same(run_dir, local)


def said(logs):
    return "".join(log.read_text() for log in logs)


def wait_for(true, processes, logs, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, said(logs)
        assert all(process.poll() is None for process in processes), said(logs)
        time.sleep(0.05)
