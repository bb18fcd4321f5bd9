import json
import re
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
from data_fixtures import sharegpt
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmix.config.load import load_config, to_yaml
from megatron_dynmix.config.run_config import RowFormat
from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.formats import FORMATS, Format, check_format, find_format
from megatron_dynmix.errors import InputError

DOCS = Path(__file__).parents[2] / "docs/data.md"
ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"id": "1", "type": "function", "function": {"name": "sum", "arguments": '{"x": 1}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "2"}
TOOLS = [{"type": "function", "function": {"name": "sum"}}]


def parse(name: str, row: object, **fields: str) -> Conversation:
    return Format(name=name, fields=fields).parse(row)


@pytest.mark.parametrize(
    ("name", "row", "turns"),
    [
        ("sharegpt", sharegpt("a", "b"), ["user:a", "assistant:b"]),
        ("messages", {"messages": [ASK, ANSWER]}, ["user:a", "assistant:b"]),
        (
            "messages",
            {"messages": [{"role": "developer", "content": "s"}, ASK, ANSWER]},
            ["system:s", "user:a", "assistant:b"],
        ),
        ("alpaca", {"instruction": "a", "input": "", "output": "b"}, ["user:a", "assistant:b"]),
        ("alpaca", {"instruction": "a", "input": "c", "output": "b"}, ["user:a\n\nc", "assistant:b"]),
        ("alpaca", {"instruction": "a", "output": "b", "text": "x"}, ["user:a", "assistant:b"]),
        ("prompt-completion", {"prompt": "a ", "completion": " b"}, ["user:a ", "assistant: b"]),
        (
            "prompt-completion",
            {"prompt": "a", "completion": "b", "system": "s"},
            ["system:s", "user:a", "assistant:b"],
        ),
        ("text", {"text": "a\nb", "id": 3}, ["text:a\nb"]),
    ],
)
def test_each_format_is_found_and_read(name: str, row: dict, turns: list[str]) -> None:
    found = find_format([("f:1", row)])
    assert found == Format(name=name)
    assert [f"{turn.role}:{turn.text}" for turn in found.parse(row).turns] == turns


def test_names_are_those_of_the_configuration() -> None:
    assert {"auto", *FORMATS} == set(get_args(RowFormat))


def test_tools_and_calls_come_as_they_were_given() -> None:
    row = {"messages": [ASK, CALLS, RESULT, ANSWER], "tools": json.dumps(TOOLS)}
    conversation = parse("messages", row)
    assert conversation.tools == tuple(TOOLS)
    assert [turn.role for turn in conversation.turns] == ["user", "assistant", "tool", "assistant"]
    call, result = conversation.turns[1:3]
    assert call.text is None and call.extra == {"tool_calls": [CALL]}
    assert result == Turn("tool", "2", {"tool_call_id": "1"})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([ASK, CALLS, ANSWER], "tool calls are followed by the assistant"),
        ([ASK, CALLS, RESULT, ASK, ANSWER], "a tool's result is followed by the user"),
        ([ASK, RESULT, ANSWER], "where no tool was called"),
        ([ASK, CALLS, RESULT], "ends with a tool's result"),
        ([{**ASK, "tool_calls": [CALL]}, ANSWER], "the user calls tools"),
        ([ASK, {**ANSWER, "tool_calls": [{"id": "1"}]}], 'no "function"'),
        ([ASK, {**ANSWER, "tool_calls": "{"}], "not JSON"),
        ([ASK, {**ANSWER, "tool_calls": [3]}], "must be a list of objects"),
        ([ASK, {**ANSWER, "tool_calls": "[" * 100_000}], "nested too deeply"),
        ([ASK, {**ANSWER, "tool_calls": '[{"function": {"name": "f", "x": NaN}}]'}], "not strict JSON"),
        (
            [ASK, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": "\ud800"}}]}],
            "half of a surrogate pair",
        ),
        (
            [ASK, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": float("nan")}}]}],
            "not JSON",
        ),
        ([ASK, CALLS, {**RESULT, "name": "\ud800"}, ANSWER], "half of a surrogate pair"),
        ([ASK, {**CALLS, "tool_calls": [{**CALL, "when": date(2024, 1, 1)}]}], "type date is not JSON"),
        ([ASK, {"role": "assistant"}], 'no key "content"'),
        ([ASK, {"role": "assistant", "content": None}], "must be a string, not null"),
        ([ASK, {"role": "assistant", "content": " "}], "text is empty"),
        ([ASK, {"role": "bot", "content": "a"}], "unknown role 'bot'"),
        ([ASK, {"role": 3, "content": "a"}], '"role" must be a string'),
        ([ASK, {"content": "a"}], 'no key "role"'),
        ([ASK, "b"], "turn 2 must be an object"),
        ([], "is empty"),
    ],
)
def test_refused_messages(messages: list, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse("messages", {"messages": messages})
    assert reason in str(caught.value)


def test_half_a_surrogate_in_a_tool_is_refused() -> None:
    row = {"messages": [ASK, ANSWER], "tools": [{"name": "\ud800"}]}
    with pytest.raises(ValueError, match="surrogate"):
        parse("messages", row)


def test_fields_have_other_names() -> None:
    row = {"question": "a", "answer": "b", "text": "noise"}
    fields = {"prompt": "question", "completion": "answer"}
    found = find_format([("f:1", row)], fields)
    assert found == Format(name="prompt-completion", fields=fields)
    assert found.parse(row).turns == (Turn("user", "a"), Turn("assistant", "b"))
    fields_row = {"question": "a", "answer": "b"}
    row = {"chat": [{"who": "user", "says": "a"}, {"who": "assistant", "says": "b"}]}
    names = {"messages": "chat", "role": "who", "content": "says"}
    assert find_format([("f:1", row)], names).parse(row).turns == found.parse(fields_row).turns
    row = {"talk": [{"who": "human", "says": "a"}, {"who": "gpt", "says": "b"}], "rules": "s"}
    names = {"conversations": "talk", "from": "who", "value": "says", "system": "rules"}
    assert parse("sharegpt", row, **names).turns[0] == Turn("system", "s")


def test_the_first_row_with_known_keys_decides() -> None:
    rows: list[tuple[str, Any]] = [
        ("f:1", ValueError("not JSON")),
        ("f:2", ["x"]),
        ("f:3", {"id": 3}),
        ("f:4", {"text": "a"}),
        ("f:5", sharegpt("a", "b")),
    ]
    assert find_format(rows).name == "text"
    with pytest.raises(
        InputError, match=r"f:1: not JSON\); rows need the keys of one of messages: messages;"
    ):
        find_format(rows[:3])
    with pytest.raises(InputError, match="no row at all"):
        find_format([])


def test_rows_with_the_keys_of_two_chats_are_not_guessed() -> None:
    with pytest.raises(InputError, match=r'f:1: has both "messages" and "conversations"; say which'):
        find_format([("f:1", {**sharegpt("a", "b"), "messages": [ASK, ANSWER]})])


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("share-gpt", {}, "'share-gpt' is unknown; use auto, messages, sharegpt"),
        ("text", {"prompt": "q"}, "'prompt' is no field of format text; it has text"),
        ("auto", {"question": "prompt"}, "'question' is no field of format auto"),
    ],
)
def test_unknown_names(name: str, fields: dict, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        check_format(name, fields)
    assert reason in str(caught.value)


def test_dates_in_a_run_yaml_are_text(tmp_path: Path) -> None:
    (tmp_path / "RUN.yaml").write_text(
        "data: {template_date: 2026-01-31, template_kwargs: {day: 2026-02-01}}"
    )
    data = load_config(tmp_path / "RUN.yaml").data
    assert (data.template_date, data.template_kwargs) == ("2026-01-31", {"day": "2026-02-01"})


KEYS = [
    *("messages", "role", "content", "tools", "tool_calls", "conversations", "from", "value", "system"),
    *(
        "history",
        "functions",
        "function_call",
        "function",
        "name",
        "arguments",
        "type",
        "reasoning",
        "weight",
    ),
    *("chat_template_kwargs", "thinking", "mask"),
    *("instruction", "input", "output", "prompt", "completion", "text"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(row=JSON, name=st.sampled_from(FORMATS))
def test_any_json_is_a_conversation_or_one_short_reason(row: object, name: str) -> None:
    try:
        conversation = parse(name, row)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    roles = [turn.role for turn in conversation.turns if turn.role != "system"]
    assert roles == ["text"] or (roles[0] == "user" and roles[-1] == "assistant")


def test_the_examples_in_the_docs_are_what_they_are_said_to_be() -> None:
    text = DOCS.read_text(encoding="utf-8")
    examples = [
        json.loads(block) for block in re.findall(r"^```json\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    ]
    found = [find_format([("docs", example)]) for example in examples]
    assert [shape.name for shape in found] == ["messages", "messages", *FORMATS[1:]]
    assert all(shape.parse(example).turns for shape, example in zip(found, examples, strict=True))


def test_settings_in_the_docs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "RUN.yaml"
    path.write_text(f"{block}  tokenizer: hf://some-org/some-model\n  template: my.jinja\n  train_on: last\n")
    data = load_config(path).data
    assert data.sources["chat"].format == "auto"
    assert data.sources["math"].fields == {"prompt": "question", "completion": "answer"}
    assert data.sources["code"].format == "messages"
    assert data.sources["talk"].roles == {"customer": "user", "bot": "assistant"}
    assert (data.tokenizer, data.train_on) == ("hf://some-org/some-model", "last")
    assert data.template == str(tmp_path / "my.jinja")
    assert load_config(path, ["--template", "chatml"]).data.template == "chatml"
    path.write_text(to_yaml(load_config(path)))
    assert load_config(path).data == data


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (
            "sources: {a: {path: a, format: csv}}",
            "source.format is 'csv'; it must be one of auto, messages",
        ),
        ("sources: {a: {path: a, fields: {prompt: 3}}}", "source.fields is {'prompt': 3}"),
        (
            "sources: {a: {path: a, roles: {bot: robot}}}",
            "source.roles is {'bot': 'robot'}.*as {bot: assistant}",
        ),
        ("template_date: 2026-13-01", "data.template_date is '2026-13-01'; it must be a day"),
        ("template_kwargs: {messages: []}", "data.template_kwargs is {'messages': ..}"),
        (
            "template_kwargs: {limit: .inf}",
            "data.template_kwargs is {'limit': inf}; it must be values that JSON",
        ),
        ("template: llama", "data.template is 'llama'; it must be one of tokenizer, vicuna, chatml, plain"),
        ("train_on: first", "data.train_on|train_on.*'first'"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, setting: str, reason: str) -> None:
    (tmp_path / "RUN.yaml").write_text(f"data: {{{setting}}}\n")
    with pytest.raises(InputError, match=reason):
        load_config(tmp_path / "RUN.yaml")
