"""The ranks of one machine under their launcher: how they are started, told of signals and ended."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_dynmix.errors import TrainingStopped
from megatron_dynmix.job import launch
from megatron_dynmix.records.jsonl import read_records
from tests.distributed import programs
from tests.distributed.conftest import SMALL
from tests.distributed.ranks import run_ranks
from tests.distributed.test_faults import without_clock

pytestmark = pytest.mark.alone
ROOT = Path(__file__).parents[2]


def program(text):
    """The command of ranks that run `text`, with what most of them need at hand."""
    prelude = "import os, pathlib, signal, subprocess, sys, time; rank = os.environ['RANK']\n"
    return [sys.executable, "-c", prelude + text]


def alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid):
    """Process ids, in the order in which they were started."""
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def test_every_rank_is_told_its_place_and_where_to_meet(tmp_path):
    text = """
from torch.distributed import TCPStore
env = os.environ
store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
store.set(rank, " ".join(env[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
other = str(1 - int(rank))
pathlib.Path(sys.argv[1], rank).write_text(store.get(other).decode())
"""
    assert launch.launch_ranks([*program(text), str(tmp_path)], 2) == 0
    assert (tmp_path / "0").read_text() == "1 2 2" and (tmp_path / "1").read_text() == "0 2 2"


@pytest.mark.parametrize("code", [2, 75, 130])
def test_an_exit_code_that_says_all_is_passed_on(code):
    assert launch.launch_ranks(program(f"sys.exit({code} if rank == '1' else 0)"), 2) == code


@pytest.mark.parametrize(
    "end, said",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL, as when memory runs out"),
        ("os.abort()", "was killed by SIGABRT; the other"),
        ("sys.exit(3)", "failed with exit code 3; the other ranks were ended"),
    ],
)
def test_the_rank_that_fails_is_named_and_nothing_is_left(end, said, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 1.0)
    text = f"""
helper = subprocess.Popen(["sleep", "600"])
pathlib.Path(sys.argv[1], rank).write_text(f"{{os.getpid()}} {{helper.pid}}")
if rank == "1":
    {end}
time.sleep(600)
"""
    with pytest.raises(TrainingStopped) as stopped:
        launch.launch_ranks([*program(text), str(tmp_path)], 2)
    pids = [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]
    assert f"rank 1 (pid {pids[2]}) {said}" in str(stopped.value) and "--resume auto" in str(stopped.value)
    wait_until(lambda: not any(map(alive, pids)), 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_reaches_all_ranks_and_not_their_helpers(number, tmp_path):
    text = """
signal.signal(int(sys.argv[2]), lambda *_: sys.exit(75 if helper.poll() is None else 1))
helper = subprocess.Popen(["sleep", "600"])
pathlib.Path(sys.argv[1], rank).touch()
time.sleep(600)
"""

    def ask():
        wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    before = signal.getsignal(number)
    assert launch.launch_ranks([*program(text), str(tmp_path), str(int(number))], 2) == 75
    assert signal.getsignal(number) == before


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    rank_text = """
from megatron_dynmix.job.launch import end_with_launcher
end_with_launcher()
helper = subprocess.Popen(["sleep", "600"])
pathlib.Path(sys.argv[1], rank).write_text(f"{os.getpid()} {helper.pid}")
time.sleep(600)
"""
    command = [*program(rank_text), str(tmp_path)]
    text = f"from megatron_dynmix.job.launch import launch_ranks; launch_ranks({command!r}, 2)"
    launcher = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT)
    files = [tmp_path / "0", tmp_path / "1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    assert all(map(alive, pids))
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(map(alive, pids)), 10)


class Started:
    """`megatron-dynmix train` in a session of its own, with what it says."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "megatron_dynmix", "train", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            # tests that run in the background inherit that interrupts are ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def until(self, words):
        """Read on until a line holds the words."""
        for line in self.process.stdout:
            if words in line:
                return
        raise AssertionError(f"{words!r} was never said; stderr: {self.process.stderr.read()}")

    def ranks(self):
        """Process ids of the ranks, in rank order."""
        return children_of(self.process.pid)

    def end(self, seconds=60):
        """Exit code and what it said to stderr."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said


@contextlib.contextmanager
def started(*arguments):
    run = Started(*arguments)
    try:
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()


def test_a_run_is_killed_stopped_and_interrupted(run_yaml, tmp_path):
    """Three ends of a run of two ranks, as its user meets them, one after the other."""
    flags = [run_yaml, "--run-dir", tmp_path, *SMALL, "--train-iters", "400", "--save-interval", "2"]
    flags += ["--nproc-per-node", "2", "--resume", "auto"]
    with started(*flags) as run:
        run.until("successfully saved checkpoint from iteration       2")
        ranks = run.ranks()
        os.kill(ranks[1], signal.SIGKILL)
        code, said = run.end()
        assert code == 1
        assert said.splitlines()[-1].startswith(
            f"megatron-dynmix: stopped: rank 1 (pid {ranks[1]}) was killed by SIGKILL"
        )
        assert "Traceback" not in said and not any(map(alive, ranks))
    with started(*flags) as run:
        run.until("successfully loaded checkpoint")
        run.until(" iteration ")
        run.process.send_signal(signal.SIGTERM)
        code, said = run.end()
        assert code == 75
        assert said.count("megatron-dynmix") == 1 and "saved and stopped on request" in said
    with started(*flags) as run:
        run.until(" lm loss per source")
        run.process.send_signal(signal.SIGINT)
        code, said = run.end()
        assert (code, said) == (
            130,
            "megatron-dynmix: interrupted, not saved; --resume auto goes on from the last checkpoint, or "
            "starts over\n",
        )
    iterations = [record["iteration"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert iterations == list(range(1, len(iterations) + 1))


def test_a_single_rank_is_interrupted_with_one_line(run_yaml, tmp_path):
    flags = [run_yaml, "--run-dir", tmp_path, *SMALL, "--train-iters", "400", "--num-workers", "1"]
    with started(*flags, "--expert-model-parallel-size", "1") as run:
        run.until(" lm loss per source")
        os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
        code, said = run.end()
    assert (code, said.count("\n")) == (130, 1), said
    assert "interrupted" in said


@pytest.mark.parametrize("log", ["2>&- | head -1", pytest.param(">&- 2>&-", marks=pytest.mark.slow)])
def test_a_run_whose_log_nobody_reads_goes_on(log, run_yaml, tmp_path):
    flags = [run_yaml, "--run-dir", tmp_path, *SMALL, "--train-iters", "3", "--nproc-per-node", "2"]
    command = " ".join(map(str, [sys.executable, "-m", "megatron_dynmix", "train", *flags]))
    shell = ["bash", "-c", f"{command} {log}; exit ${{PIPESTATUS[0]}}"]
    assert subprocess.run(shell, cwd=ROOT, timeout=120).returncode == 0
    assert [record["iteration"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "checkpoints/iter_0000003/checksums.json").is_file()


@pytest.mark.slow
def test_torchrun_starts_ranks_again_and_they_end_like_an_undisturbed_run(run_yaml, tmp_path):
    flags = [*SMALL, "--train-iters", "6", "--save-interval", "1", "--interval", "3"]
    whole = run_ranks(2, programs.train, run_yaml, flags, tmp_path / "whole")[0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "-m", "--", "megatron_dynmix", "train", str(run_yaml)]
    command += ["--run-dir", str(tmp_path / "run"), "--resume", "auto", *flags]
    log = tmp_path / "log"
    with log.open("w") as said:
        run = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
    tracker = tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt"
    try:
        wait_until(lambda: tracker.exists() and int(tracker.read_text()) >= 2, 120)
        os.kill(children_of(run.pid)[-1], signal.SIGKILL)
        assert run.wait(timeout=180) == 0, log.read_text()
    finally:
        for pid in [*children_of(run.pid), run.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    assert log.read_text().count("training on 2 ranks") == 2, log.read_text()
    for name, records in programs.records_of(tmp_path / "run").items():
        assert without_clock(records) == without_clock(whole[name])
