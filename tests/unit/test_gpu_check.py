"""The check on a GPU: parts that end in every way give a line, and the figures are what they say.

One of them runs here; all, at a tiny size, in `make test-slow`.
"""

import json
import re
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from megatron_dynmix.files import parse_json
from tests.distributed.ranks import run_ranks
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import figures, supervise, synchronizations

PARTS = "tests.unit.gpu_check_parts"


@pytest.fixture
def job(tmp_path):
    return supervise.Job(data=tmp_path / "data", scratch=tmp_path, carried=tmp_path / "none", tiny=True)


def lines_of(names, job, seconds=60.0):
    parts = [supervise.Part(f"{PARTS}:{name}", 20.0) for name in names]
    return list(supervise.lines_of(parts, job, job.scratch / "log.txt", time.monotonic() + seconds))


def test_every_way_a_part_can_end_is_a_line_and_the_others_go_on(job):
    names = ["good", "as_good", "broken", "as_good", "killed", "not_a_number", "missing"]
    lines = lines_of(names, job)
    assert [line["part"] for line in lines] == names
    assert [line["ok"] for line in lines] == [True, True, False, True, False, False, False]
    good, same_process, broken, another_process, killed, not_json, missing = lines
    assert (good["value"], good["folder"]) == (1.5, "data")
    assert good["process"] == same_process["process"] != another_process["process"]
    assert broken["seen"] == 3 and "odd" not in broken
    assert broken["error"].startswith("ValueError: not what it should be (tests/unit/gpu_check_parts.py:")
    assert killed["error"] == "its process died with exit code 7"
    assert not_json["error"].startswith("ValueError") and missing["error"].startswith("AttributeError")
    log = (job.scratch / "log.txt").read_text()
    assert "what a library says" in log and "Traceback" in log


def test_a_part_that_runs_out_of_time_is_a_line_and_the_log_says_where_it_was(job, monkeypatch):
    monkeypatch.setattr(supervise, "IMPORTING", 0)
    start = time.monotonic()
    parts = [supervise.Part(f"{PARTS}:endless", 2.0), supervise.Part(f"{PARTS}:good", 20.0)]
    endless, good = supervise.lines_of(parts, job, job.scratch / "log.txt", start + 30)
    assert endless["error"] == "ran out of its 2 s; the log says where it was" and good["ok"]
    assert time.monotonic() - start < 30
    assert "gpu_check_parts.py" in (job.scratch / "log.txt").read_text()


def test_parts_for_which_no_time_is_left_are_lines_too(job):
    (line,) = lines_of(["good"], job, seconds=0.0)
    assert line == {"part": "good", "ok": False, "seconds": 0.0, "error": "not begun: no time was left"}


def checked(monkeypatch, capsys, tmp_path, *names):
    parts = [supervise.Part(f"{PARTS}:{name}", 20.0) for name in names]
    monkeypatch.setattr(gpu_check, "IN_ONE_PROCESS", (parts,))
    monkeypatch.setenv("PYTHONPATH", "")
    folders = ["--output", str(tmp_path / "out"), "--carried", str(tmp_path / "carried")]
    code = gpu_check.main([*folders, "--tiny"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (tmp_path / "out/lines.jsonl").read_text().splitlines() == [json.dumps(line) for line in lines]
    return code, lines


def test_the_last_line_is_the_verdict(monkeypatch, capsys, tmp_path):
    code, (install, good, verdict) = checked(monkeypatch, capsys, tmp_path, "good")
    assert code == 0 and good["ok"] and install["wheels"] == 0
    assert (verdict["part"], verdict["ok"], verdict["passed"], verdict["failed"]) == ("verdict", True, 2, [])


def test_a_failed_part_and_a_broken_wheel_are_named_in_the_verdict(monkeypatch, capsys, tmp_path):
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried/broken-1-py3-none-any.whl").write_bytes(b"no zip")
    code, lines = checked(monkeypatch, capsys, tmp_path, "broken", "good")
    assert code == 1 and "broken" in lines[0]["error"]
    assert lines[-1]["failed"] == ["install", "broken"] and lines[-1]["passed"] == 1


def test_an_unknown_part_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit) as refused:
        gpu_check.main(["losses"])
    assert refused.value.code == 2
    assert "no part is called losses; there are device, losses_fp32" in capsys.readouterr().err


def test_every_part_is_there():
    for part in (part for parts in gpu_check.IN_ONE_PROCESS for part in parts):
        module, _, name = part.function.partition(":")
        source = gpu_check.Path(module.replace(".", "/") + ".py").read_text()
        assert f"\ndef {name}(job: Job, figures: Figures) -> None:" in source


def test_flops_of_a_dense_layer_by_hand():
    hidden, length, layers, vocabulary = 8, 16, 2, 32
    layer = 4 * hidden**2 + 3 * hidden * 24
    products = 2 * (layers * layer + vocabulary * hidden)
    attention = layers * 2 * 2 * hidden * sum(range(1, length + 1)) / length  # scores, then values
    active = layers * layer + 2 * vocabulary * hidden
    flops = figures.training_flops(active, vocabulary * hidden, layers, hidden, length)
    assert flops == pytest.approx(3 * (products + attention), rel=1 / length)
    assert flops == 3 * products + 12 * layers * hidden * length / 2


def test_speed_and_utilization():
    seconds_P = np.array([9.0, 2.0, 1.0])
    rate = figures.tokens_per_second(100, seconds_P)
    assert rate == 50.0  # of the median
    assert figures.utilization(6e9, rate, 1e12) == pytest.approx(0.3)
    pairs = figures.ratio_of_pairs(np.array([1.0, 2.0, 9.0]), np.array([1.0, 1.0, 3.0]))
    assert pairs == {"ratio": 2.0, "ratio_q1": 1.5, "ratio_q3": 2.5}


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([], 1.0),
        ([(0, 10)], 0.0),
        ([(0, 2), (1, 4), (1, 3), (8, 9)], 0.5),
        ([(5, 6), (0, 1)], 0.8),
        ([(-5, 1), (9, 20)], 0.8),
    ],
)
def test_idle_share(spans, share):
    assert figures.idle_share(spans, 0.0, 10.0) == pytest.approx(share)


def test_largest_difference_is_relative_and_never_hides_what_is_not_finite():
    assert figures.largest_difference([2.0, 4.0], [2.0, 4.2]) == pytest.approx(0.2 / 4.2)
    assert figures.largest_difference([1.0, float("nan")], [1.0, 1.0]) == float("inf")
    with pytest.raises(ValueError, match="1 values seen, 2 recorded"):
        figures.largest_difference([1.0], [1.0, 1.0])


def test_waits_on_a_gpu_are_counted_by_line_and_held_against_the_trace(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with synchronizations.synchronizations(torch.device("cuda")) as seen:
        for _ in range(3):
            parse_json(b"1.5", lambda _: warnings.warn("called a synchronizing CUDA operation", stacklevel=1))
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    ((line, times),) = seen.items()
    assert times == 3 and re.fullmatch(r"megatron_dynmix/files\.py:\d+ \(parse_json\)", line)
    beyond = synchronizations.beyond
    assert beyond(seen, {line: 3, "elsewhere": 9}) == {} and beyond(seen, {line: 1}) == {line: 2}
    assert beyond(seen, {"megatron_dynmix/files.py:1 (parse_json)": 3}) == {line: 3}


def real_parts(names, job):
    """What parts figure out in a process that has torch loaded."""
    from tools.gpu_check import small

    found = {}
    for name in names:
        getattr(small, name)(job, found.setdefault(name, {}))
    return found


def test_a_cpu_agrees_with_the_one_on_record(job):
    (found,) = run_ranks(1, real_parts, ["counts"], job)
    assert found["counts"]["differing"] == 0


@pytest.mark.slow
def test_all_parts_run_at_a_tiny_size_on_a_cpu(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tools.gpu_check", "--tiny", "--seconds", "1200"]
    folders = ["--output", str(tmp_path), "--carried", str(tmp_path / "none")]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 + sum(map(len, gpu_check.IN_ONE_PROCESS))
