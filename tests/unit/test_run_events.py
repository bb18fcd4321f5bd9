"""`events.jsonl`: when a run was begun, gone on with, and how it ended."""

import json

import pytest
import torch

from megatron_dynmix.errors import StoppedOnRequest, TrainingStopped
from megatron_dynmix.records.writer import EVENTS, recorded


@pytest.fixture
def rank(monkeypatch):
    """Be a rank of two."""

    def be(number):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: number)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    be(0)
    return be


def lines(run_dir):
    found = map(json.loads, (run_dir / EVENTS).read_text().splitlines())
    return [(line["event"], line["iteration"], line["notes"]) for line in found]


def test_a_run_that_is_stopped_and_gone_on_with_tells_its_story(tmp_path, rank):
    done = [0]
    with pytest.raises(StoppedOnRequest), recorded(tmp_path, lambda: done[0], resumed=False, notes=[]):
        done[0] = 7
        raise StoppedOnRequest("saved")
    with recorded(tmp_path, lambda: done[0], resumed=True, notes=["optimizer.lr: 1 -> 2"]):
        done[0] = 9
    assert lines(tmp_path) == [
        *(("start", 0, []), ("stopped", 7, ["saved"])),
        *(("resume", 7, ["optimizer.lr: 1 -> 2"]), ("finished", 9, [])),
    ]


@pytest.mark.parametrize("error", [TrainingStopped("no weights"), MemoryError("full")])
def test_what_fails_is_told_and_not_hidden(tmp_path, rank, error):
    with (
        pytest.raises(type(error)),
        recorded(tmp_path, lambda: 3, resumed=False, notes=[]),
    ):
        raise error
    assert lines(tmp_path)[-1] == ("failed", 3, [str(error)])


def test_only_rank_0_writes(tmp_path, rank):
    rank(1)
    with recorded(tmp_path, lambda: 0, resumed=False, notes=[]):
        pass
    assert not (tmp_path / EVENTS).exists()
