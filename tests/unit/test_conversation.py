import json
from pathlib import Path

import pytest
from data_fixtures import sharegpt

from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.formats import parse_sharegpt
from megatron_dynmix.data.prepare.readers import raw_rows
from megatron_dynmix.errors import InputError

HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
SYSTEM = {"from": "system", "value": "s"}


def turns_of(*turns: object, **extra: object) -> Conversation:
    return parse_sharegpt({"conversations": list(turns), **extra})


@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "assistant", "chatgpt"])
def test_role_names(human: str, gpt: str) -> None:
    conversation = turns_of({"from": human, "value": "a"}, {"from": gpt, "value": " b "})
    assert conversation.turns == (Turn("user", "a"), Turn("assistant", " b "))


@pytest.mark.parametrize(
    "extra", [{"system_prompt": "s"}, {"system": "s"}, {"system": None, "system_prompt": "s"}]
)
def test_system_key(extra: dict) -> None:
    assert turns_of(HUMAN, GPT, **extra).turns[0] == Turn("system", "s")


def test_system_as_first_turn() -> None:
    assert turns_of(SYSTEM, HUMAN, GPT).turns[0] == Turn("system", "s")


@pytest.mark.parametrize("extra", [{"system_prompt": None}, {"system": ""}, {"system": " \n"}, {"id": 7}])
def test_no_system(extra: dict) -> None:
    assert [turn.role for turn in turns_of(HUMAN, GPT, **extra).turns] == ["user", "assistant"]


def test_blank_system_turn_stays_as_it_was_given() -> None:
    assert turns_of({"from": "system", "value": ""}, HUMAN, GPT).turns[0] == Turn("system", "")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([HUMAN, GPT], "must be a JSON object, not a list"),
        ("text", "not a string"),
        (True, "not a boolean"),
        ({}, 'no key "conversations"'),
        ({"conversations": None}, "not null"),
        ({"conversations": "x"}, "not a string"),
        ({"conversations": {"a": 1}}, "not an object"),
        ({"conversations": []}, '"conversations" is empty'),
        ({"conversations": ["hi"]}, "turn 1 must be an object"),
        ({"conversations": [HUMAN, [GPT]]}, "turn 2 must be an object, not a list"),
        ({"conversations": [{"value": "a"}, GPT]}, 'turn 1 has no key "from"'),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, 'turn 2 has no key "value"'),
        ({"conversations": [{"from": 3, "value": "a"}]}, '"from" must be a string, not a number'),
        ({"conversations": [{"from": "human", "value": None}]}, '"value" must be a string, not null'),
        ({"conversations": [HUMAN, {"from": "tool", "value": "a"}, GPT]}, "where no tool was called"),
        ({"conversations": [{"from": "Human", "value": "a"}]}, "roles: {Human: user}"),
        ({"conversations": [HUMAN, SYSTEM, GPT]}, "the system turn is not the first"),
        ({"conversations": [SYSTEM, SYSTEM, HUMAN, GPT]}, "more than one system prompt"),
        ({"conversations": [SYSTEM, HUMAN, GPT], "system": "t"}, "more than one system prompt"),
        ({"conversations": [HUMAN, GPT], "system": 4}, '"system" must be a string, not a number'),
        ({"conversations": [HUMAN, HUMAN, GPT]}, "two user turns in a row"),
        ({"conversations": [HUMAN, GPT, GPT]}, "two assistant turns in a row"),
        ({"conversations": [GPT, HUMAN, GPT]}, "starts with an assistant turn"),
        ({"conversations": [SYSTEM]}, "no assistant turn"),
        ({"conversations": [HUMAN]}, "no assistant turn"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "ends with a user turn"),
        (sharegpt("a", " \n"), "turn 2: the assistant's text is empty"),
        (sharegpt("", "b"), "turn 1: the user's text is empty"),
        (sharegpt("a", "b\ud800"), "half of a surrogate pair at character 1"),
        (sharegpt("a", "b", system="\udfff"), "half of a surrogate pair"),
    ],
)
def test_refused_rows(row: object, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_sharegpt(row)
    assert reason in str(caught.value)


def read(path: Path, content: bytes) -> list[tuple[int, object]]:
    """Numbers and values; a ValueError in place of a bad one."""
    path.write_bytes(content)
    found: list[tuple[int, object]] = []
    for row in raw_rows(path):
        number = int(row.place.removeprefix(f"{path}:"))
        try:
            found.append((number, row.parse()))
        except ValueError as error:
            found.append((number, error))
    return found


def test_lines_end_at_newline_only(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\u2029"
    lines = read(
        tmp_path / "x.jsonl",
        json.dumps([text], ensure_ascii=False).replace("[", '{"t":').replace("]", "}").encode(),
    )
    assert lines == [(1, {"t": text})]


def test_crlf_blank_lines_bom_and_missing_last_newline(tmp_path: Path) -> None:
    assert read(tmp_path / "x", b'\xef\xbb\xbf{"a": 1}\r\n\r\n \t\n{"b": 2}') == [
        (1, {"a": 1}),
        (4, {"b": 2}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "not JSON"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
        (b'{"a": [1,]}', "not JSON"),
        (b'{"a": "\x00"}', "control character"),
        (b'{"a": NaN}', "NaN is no JSON value"),
        (b'{"a": -Infinity}', "-Infinity is no JSON value"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not strict JSON"),
    ],
)
def test_I12_bad_line_is_reported_in_its_place(tmp_path: Path, line: bytes, reason: str) -> None:
    lines = read(tmp_path / "x", b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    assert [lines[0], lines[2]] == [(1, {"a": 1}), (3, {"b": 2})]
    number, bad = lines[1]
    assert number == 2
    assert isinstance(bad, ValueError)
    assert reason in str(bad)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"", "holds no rows"),
        (b"\n \r\n", "holds no rows"),
        (b'[\n{"a": 1}\n]', "JSON array"),
        (b"\x1f\x8b\x08\x00", "gunzip"),
        (b"PK\x03\x04", "unzip"),
        ('{"a": 1}'.encode("utf-16"), "iconv"),
        ('{"a": 1}'.encode("utf-16-le"), "iconv"),
        ('{"a": 1}'.encode("utf-16-be"), "iconv"),
        ('{"a": 1}'.encode("utf-32-be"), "iconv"),
    ],
)
def test_I12_file_is_refused_with_its_name_and_a_remedy(tmp_path: Path, content: bytes, remedy: str) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(InputError) as caught:
        read(path, content)
    assert str(path) in str(caught.value)
    assert remedy in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "no.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            list(raw_rows(path))
