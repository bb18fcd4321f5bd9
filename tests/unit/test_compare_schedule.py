"""Cells as processes: several at a time, one after the other's failure, all asked to stop."""

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from megatron_dynmix.compare.schedule import Task, run_tasks
from megatron_dynmix.errors import StoppedOnRequest


def task(folder, name, *programs):
    cell = SimpleNamespace(label=name, run_dir=folder / name, log=folder / name / "log.txt")
    return Task(cell, tuple([sys.executable, "-c", program] for program in programs))


def test_a_failure_costs_no_other_cell_and_ends_its_own(tmp_path):
    broken = "import sys; print('megatron-dynmix: loss is NaN'); print('bye'); sys.exit(1)"
    tasks = [
        task(tmp_path, "broken", broken, "open('after', 'w')"),
        task(tmp_path, "good", "print(1)", f"open({str(tmp_path / 'second')!r}, 'w')"),
        task(tmp_path, "silent", "import os; os.kill(os.getpid(), 9)"),
        task(tmp_path, "finished"),
    ]
    said = []
    failures = run_tasks(tasks, 2, said.append)
    assert failures.keys() == {0, 2}
    assert failures[0].startswith("loss is NaN (exit code 1;")
    assert failures[2].startswith("it said nothing (killed by SIGKILL;")
    assert (tmp_path / "second").exists() and not (tmp_path / "broken/after").exists()
    assert any(line.startswith("[4/4]") for line in said)
    assert not any("finished" in line for line in said)


def test_an_old_failure_is_not_told_again(tmp_path):
    first = task(tmp_path, "cell", "import sys; sys.exit('megatron-dynmix: the old reason')")
    second = task(tmp_path, "cell", "import os; os.kill(os.getpid(), 9)")
    assert "the old reason" in run_tasks([first], 1, print)[0]
    assert "the old reason" not in run_tasks([second], 1, print)[0]


@pytest.mark.parametrize("jobs", [1, 3])
def test_as_many_at_a_time_as_asked_for_in_their_order(tmp_path, jobs):
    tasks = [task(tmp_path, str(number), "import time; time.sleep(0.3)") for number in range(4)]
    said = []
    assert run_tasks(tasks, jobs, said.append) == {}
    started = [index for index, line in enumerate(said) if line.endswith("started")]
    assert [said[index].split("] ")[1] for index in started] == [f"{n}: started" for n in range(4)]
    assert sum(line.endswith("started") for line in said[:jobs]) == jobs
    assert "started" not in said[jobs]


def test_each_cell_has_one_thread_unless_told(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    echo = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    run_tasks([task(tmp_path, "one", echo)], 1, print)
    assert "threads 1" in (tmp_path / "one/log.txt").read_text()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    run_tasks([task(tmp_path, "four", echo)], 1, print)
    assert "threads 4" in (tmp_path / "four/log.txt").read_text()


def test_a_request_to_stop_is_passed_on_and_waited_for(tmp_path):
    saving = (
        "import pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def save(*_):\n"
        "    time.sleep(0.3)\n"
        "    (folder / 'saved').touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(folder / 'running').touch()\n"
        "time.sleep(60)\n"
    )

    def ask():
        while not (tmp_path / "running").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(StoppedOnRequest):
        run_tasks([task(tmp_path, "cell", saving), task(tmp_path, "next", "1")], 1, print)
    thread.join()
    assert (tmp_path / "saved").exists() and not (tmp_path / "next").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
