"""What an operator may write while a run goes on: none of it ends the run."""

import json

import pytest

from megatron_dynmix import platform

platform.start()
from megatron_dynmix.training.reweighting import BrokenOverride, read_override  # noqa: E402

SOURCES = ("chat", "math", "code")


def said(tmp_path, content, **resolved):
    path = tmp_path / "override.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_override(path, SOURCES, resolved)


def test_no_file_is_no_word(tmp_path):
    assert read_override(tmp_path / "override.json", SOURCES, {}) is None


@pytest.mark.parametrize(
    "content",
    [
        *("", '{"pause": ["ma', "[]", '{"pause": ["nobody"]}', "[" * 100_000),
        '{"pause": ["math"], "pause": ["chat"]}',
        '{"weights": {"chat": 1e308, "math": 1e308, "code": 1e308}}',
        f'{{"weights": {{"chat": {"9" * 400}, "math": 1, "code": 1}}}}',
    ],
    ids=["empty", "half", "a list", "unknown", "nested", "twice", "sum", "digits"],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content):
    with pytest.raises(BrokenOverride, match=r"override\.json cannot be used: .+; correct or remove it"):
        said(tmp_path, content)


def test_bytes_that_are_no_text_and_a_folder_are_named(tmp_path):
    path = tmp_path / "override.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(BrokenOverride, match="cannot be used"):
        read_override(path, SOURCES, {})
    with pytest.raises(BrokenOverride, match="cannot be used"):
        read_override(tmp_path, SOURCES, {})
