"""Files: what a user wrote is read strictly, and what we write is whole or not there."""

import hashlib
import json
import re

import pytest

from megatron_dynmix.errors import InputError
from megatron_dynmix.files import name_folder, read_json, read_object, replacing, sha256, write_atomically


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path):
    draft, final = tmp_path / "draft", tmp_path / "final"
    for folder in (draft, final):
        folder.mkdir()
    (draft / "file").write_text("content")
    name_folder(draft, final)
    assert [path.name for path in final.iterdir()] == ["file"] and not draft.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("{", "cannot be read: not JSON"),
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_json_of_a_user_is_strict(tmp_path, text, message):
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + message):
        read_json(path)


def test_an_object_of_another_program_may_hold_infinity(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_object(path, "fetch it again") == {"time_step_limit": [0.0, float("inf")]}
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"config\.json .*; fetch it again"):
            read_object(path, "fetch it again")


def test_a_digest_is_that_of_the_bytes():
    parts = ["a", 1, {"b": 2.5}]
    wanted = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    assert sha256(parts) == sha256(json.dumps(parts)) == sha256(json.dumps(parts).encode()) == wanted
