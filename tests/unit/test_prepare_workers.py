"""Several processes give what one gives, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import worker_functions
from data_fixtures import (  # noqa: F401
    prepare,
    tokenizer_dir_fixture,
    tokenizer_fixture,
    varied_rows,
    write_jsonl,
)

from megatron_dynmix.data.prepare import prepare as prepare_module
from megatron_dynmix.data.prepare.workers import map_in_order
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.errors import CommandFailed, InputError


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def test_output_is_bit_equal_for_any_number_of_workers(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "CHUNK_BYTES", 2000)
    rows = [*varied_rows(60), "{", *varied_rows(20, seed=1)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    reports = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        options = {"inputs": [path], "held_out": 5, "workers": workers}
        reports.append(prepare(folder, [], tokenizer, **options))
    assert reports[0] == reports[1]
    assert (reports[0].broken, reports[0].first_broken[0].split(":")[1]) == (1, "61")
    for suffix in ("bin", "idx", "digests", "probe.bin", "probe.idx", "json"):
        one, several = [(tmp_path / f"{n}/source.{suffix}").read_bytes() for n in (1, 3)]
        if suffix != "json":
            assert one == several, suffix


def test_a_worker_that_dies_is_one_message_and_leaves_no_process() -> None:
    before = {child.pid for child in workers_of(psutil.Process())}
    with pytest.raises(CommandFailed, match="a worker process died"):
        list(map_in_order(worker_functions.kill_yourself, range(5), 2, preload=worker_functions.NAME))
    left = [
        c for c in workers_of(psutil.Process()) if c.pid not in before and "forkserver" not in c.cmdline()
    ]
    assert len(left) <= 2, "the server that starts workers and the one that tracks semaphores"


def test_an_error_in_a_worker_is_that_error() -> None:
    done = []
    with pytest.raises(InputError, match=r"^item 3 is bad$"):
        for item in map_in_order(worker_functions.refuse_three, range(100), 2, preload=worker_functions.NAME):
            done.append(item)
    assert done == [0, 1, 2]


def test_items_are_taken_as_room_appears() -> None:
    taken = []

    def items() -> object:
        for item in range(50):
            taken.append(item)
            yield item

    results = map_in_order(abs, items(), 2, preload=worker_functions.NAME)
    assert next(results) == 0
    assert len(taken) <= 6
    results.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_leaves_no_process(number: signal.Signals) -> None:
    started = subprocess.Popen(
        [sys.executable, worker_functions.__file__],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None and started.stdout.readline() == "working\n"
    family = psutil.Process(started.pid).children(recursive=True)
    assert len(family) >= 2
    if number == signal.SIGINT:
        os.killpg(started.pid, number)  # as a terminal does
    else:
        started.send_signal(number)
    _, said = started.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert "Traceback" not in said
    assert started.returncode == (130 if number == signal.SIGINT else -number)


@pytest.mark.slow
def test_an_interrupted_prepare_leaves_no_process_and_no_file(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", varied_rows(200) * 400)
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "megatron_dynmix", "prepare", "--input", str(path)),
        *("--output", str(out / "source"), "--tokenizer", str(tokenizer_dir), "--workers", "2"),
    ]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    draft = out / ".source.draft/source.bin"
    deadline = time.monotonic() + 120
    while not draft.exists() or not draft.stat().st_size:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(started.pid).children(recursive=True)
    os.killpg(started.pid, signal.SIGINT)
    _, said = started.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert started.returncode == 130
    assert said.count("interrupted") == 1 and "Traceback" not in said
    assert list(out.iterdir()) == []
