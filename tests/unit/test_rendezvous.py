"""What a rank is told of its job: refused at once where it cannot be, in one message."""

import re

import pytest
from test_cli import refused

from megatron_dynmix.errors import InputError
from megatron_dynmix.job.rendezvous import world_size_of_job

GOOD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
NAMES = (*GOOD, "LOCAL_WORLD_SIZE")


@pytest.fixture
def told(monkeypatch):
    """Be told of a good job with some values changed; None takes a variable away."""

    def tell(**changes):
        for name, value in {**dict.fromkeys(NAMES), **GOOD, **changes}.items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return tell


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"MASTER_ADDR": "localhost"},
        {"MASTER_ADDR": "::1"},
        {"MASTER_PORT": "1"},
        {"MASTER_PORT": "65535"},
        {"LOCAL_RANK": None},
        {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_a_job_that_can_be_is_joined(told, changes):
    told(**changes)
    assert world_size_of_job() == 2


def test_a_process_that_is_no_rank_is_alone(told):
    told(**dict.fromkeys(NAMES))
    assert world_size_of_job() == 1
    told(**{**dict.fromkeys(NAMES), "WORLD_SIZE": "1"})
    assert world_size_of_job() == 1


CASES = [
    *(
        ({name: "abc"}, rf"{name} is 'abc'; it must be a whole number")
        for name in NAMES
        if name != "MASTER_ADDR"
    ),
    *(({name: "-1"}, rf"{name} is '-1'; it must be") for name in NAMES if name != "MASTER_ADDR"),
    *(({name: ""}, rf"{name} is ''; it must be") for name in NAMES if name != "MASTER_ADDR"),
    ({"RANK": "1.0"}, r"RANK is '1\.0'"),
    ({"RANK": "²"}, "RANK is '²'"),
    ({"RANK": "9" * 5000}, "RANK is '9{40}'"),
    ({"WORLD_SIZE": None}, "RANK is '1', but WORLD_SIZE is not set; .*--nproc-per-node"),
    ({"MASTER_PORT": None}, "RANK is '1', but MASTER_PORT is not set"),
    ({"RANK": None}, "WORLD_SIZE is '2', but RANK is not set; .*--nproc-per-node"),
    ({"RANK": "5"}, "RANK is 5, but WORLD_SIZE is 2; ranks are counted from 0 to 1"),
    ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
    ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but WORLD_SIZE is 2"),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1, but LOCAL_WORLD_SIZE is 1"),
    ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3, but WORLD_SIZE is 2"),
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is 0, but WORLD_SIZE is 2"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; .*1 to 65535"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT is 0; .*1 to 65535"),
    *(({"MASTER_ADDR": value}, "MASTER_ADDR is not set, or empty") for value in (None, "", " ")),
    ({"MASTER_ADDR": "[::1]"}, r"MASTER_ADDR is '\[::1\]'; .*without brackets"),
    ({"MASTER_ADDR": "tcp://127.0.0.1"}, "without brackets or a scheme"),
    *(
        ({"MASTER_ADDR": value}, f"MASTER_ADDR is {re.escape(repr(value))}, which .* cannot find")
        for value in ("no-such-host.invalid", "127.0.0.1:29500", "300.0.0.1", "a" * 300, "two words")
    ),
]


@pytest.mark.parametrize(("changes", "said"), CASES, ids=str)
def test_what_cannot_be_is_refused(told, changes, said):
    told(**changes)
    with pytest.raises(InputError) as refusal:
        world_size_of_job()
    assert re.search(said, str(refusal.value)), refusal.value


def test_train_says_so_before_it_reads_anything_else(told, capsys, tmp_path):
    told(MASTER_PORT="abc")
    said = refused(capsys, "train", str(tmp_path / "none.yaml"), "--run-dir", str(tmp_path / "run"))
    assert "(rank 1): MASTER_PORT is 'abc'" in said
