"""`plan --trace` where it cannot be: what is said; and its text."""

import subprocess

import pytest
import torch

from megatron_dynmix.commands.tracing import trace_stages, traced_stages
from megatron_dynmix.config.host import Host
from megatron_dynmix.errors import InputError
from megatron_dynmix.platform.fake import process
from megatron_dynmix.training.trace import trace


@pytest.fixture
def complete(monkeypatch, tmp_path):
    """A machine that has everything."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(process.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(process, "engine_folder", lambda: tmp_path)
    monkeypatch.setattr(process.sys, "platform", "linux")
    return monkeypatch


def test_a_complete_machine_lacks_nothing(complete):
    assert process.what_is_missing(transformer_engine=True) is None


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (torch.version, "cuda", None, "install the CUDA build of torch, which needs no GPU"),
        (process.shutil, "which", lambda name: None, "no C compiler"),
        (process, "engine_folder", lambda: None, "pip install --no-deps transformer-engine==2.11.0"),
        (process.sys, "platform", "darwin", "it needs Linux"),
    ],
)
def test_what_is_missing_is_said_with_its_remedy(owner, name, value, said, complete, tmp_path):
    complete.setattr(owner, name, value)
    assert said in process.what_is_missing(transformer_engine=True)
    with pytest.raises(InputError, match="an iteration cannot be traced here"):
        trace(tmp_path / "RUN.yaml", [], rank=0, world_size=1, transformer_engine=True)
    without = process.what_is_missing(transformer_engine=False)
    assert (without is None) == (name == "engine_folder")


def test_ranks_on_cpus_are_not_traced(tmp_path):
    with pytest.raises(InputError, match="the ranks are planned on CPUs"):
        trace_stages(None, tmp_path / "RUN.yaml", [], Host(cuda=False, transformer_engine=False))


def test_the_first_a_middle_and_the_last_stage_are_traced():
    assert [traced_stages(pp) for pp in (1, 2, 3, 4, 8)] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 4, 7]]


def test_what_a_traced_process_says_is_told(complete, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "environment", lambda *_: {})
    ended = subprocess.CompletedProcess([], 134, stderr="no stack left")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(InputError, match="ended with 134: no stack left"):
        trace(tmp_path / "RUN.yaml", [], rank=0, world_size=1, transformer_engine=False)
