"""Shapes of rows that users of other tools have: read as what they say, or refused with a remedy."""

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.formats import Format, find_format
from megatron_dynmix.data.prepare.notices import Notice
from megatron_dynmix.data.prepare.structs import without_nulls
from megatron_dynmix.files import Number, parse_json

SCHEMA = {"name": "tide", "parameters": {"type": "object", "properties": {"port": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": SCHEMA}]
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Gdynia"}}}
ASK, ANSWER = {"role": "user", "content": "High tide?"}, {"role": "assistant", "content": "At noon."}


def parse(row: dict, **roles: str) -> Conversation:
    """Parse a row as a file is read in which it is the first."""
    row = parse_json(json.dumps(row).encode(), Number)
    return find_format([("f:1", row)], roles=roles).parse(row)


def reason(row: dict) -> str:
    with pytest.raises(ValueError) as caught:
        parse(row)
    return str(caught.value)


def sharegpt(*pairs: tuple[str, Any], **extra: Any) -> dict:
    return {"conversations": [{"from": who, "value": says} for who, says in pairs], **extra}


def messages(*turns: dict, **extra: Any) -> dict:
    return {"messages": list(turns), **extra}


def answers(row: dict) -> list[Turn]:
    return [turn for turn in parse(row).turns if turn.role == "assistant"]


ONE_ROUND = (Turn("user", "High tide?"), Turn("assistant", "At noon."))


@pytest.mark.parametrize(
    "row",
    [
        messages(ASK, ANSWER),
        {"conversations": [ASK, ANSWER]},
        {"messages": json.dumps([ASK, ANSWER])},
        {"conversations": {"role": ["user", "assistant"], "content": ["High tide?", "At noon."]}},
        {"conversations": {"from": ["human", "gpt"], "value": ["High tide?", "At noon."]}},
        {"messages": [{"from": "human", "value": "High tide?"}, {"from": "gpt", "value": "At noon."}]},
        messages({**ASK, "content": [{"type": "text", "text": "High tide?"}]}, ANSWER),
        messages({**ASK, "content": [{"type": "text", "text": "High "}, {"text": "tide?"}]}, ANSWER),
        {"prompt": "High tide?", "completion": [ANSWER]},
        {"instruction": "High tide?", "output": "At noon.", "history": []},
    ],
)
def test_one_round_in_many_shapes(row: dict) -> None:
    assert parse(row).turns == ONE_ROUND
    assert parse(row).notices == ()


def test_prompt_and_completion_are_lists_of_turns() -> None:
    row = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER], "tools": TOOLS}
    assert [turn.is_trained for turn in parse(row).turns] == [False, False, False, None]
    assert parse(row).tools == tuple(TOOLS)
    assert parse({"prompt": [ASK], "completion": "At noon."}).turns[1] == ONE_ROUND[1]


@pytest.mark.parametrize("keys", [("instruction", "output"), ("prompt", "completion")])
@pytest.mark.parametrize(
    "history",
    [[["Low tide?", "At six."]], [{**ASK, "content": "Low tide?"}, {**ANSWER, "content": "At six."}]],
)
def test_earlier_rounds(keys: tuple[str, str], history: list) -> None:
    row = {keys[0]: "High tide?", keys[1]: "At noon.", "history": history, "system": "Be brief."}
    earlier = (Turn("system", "Be brief."), Turn("user", "Low tide?"), Turn("assistant", "At six."))
    assert parse(row).turns == (*earlier, *ONE_ROUND)


def test_a_system_prompt_beside_messages() -> None:
    assert parse(messages(ASK, ANSWER, system="Be brief.")).turns[0] == Turn("system", "Be brief.")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_three_names(key: str) -> None:
    said = Turn("assistant", "At noon.", reasoning="The moon is full.")
    assert answers(messages(ASK, {**ANSWER, key: "The moon is full."})) == [said]
    assert answers({"prompt": "High tide?", "completion": "At noon.", key: "The moon is full."}) == [said]
    assert answers(messages(ASK, {**ANSWER, key: ""}))[0].reasoning == ""
    assert answers(messages(ASK, {**ANSWER, key: None}))[0].reasoning is None
    of_user = parse(messages({**ASK, key: "Hm."}, ANSWER)).notices
    assert of_user == (Notice("unused key", f"{key} of a turn (reasoning that is not an answer's)"),)


def test_reasoning_as_a_part_of_the_content() -> None:
    parts = [{"type": "thinking", "thinking": "The moon is full."}, {"type": "text", "text": "At noon."}]
    nested = [{"type": "thinking", "thinking": [{"type": "text", "text": "The moon is full."}]}, parts[1]]
    said = [Turn("assistant", "At noon.", reasoning="The moon is full.")]
    assert answers(messages(ASK, {**ANSWER, "content": parts})) == said
    assert answers(messages(ASK, {**ANSWER, "content": nested})) == said


@pytest.mark.parametrize(
    ("flag", "trained"),
    [
        ({"weight": 0}, False), ({"weight": 1}, True), ({"weight": 1.0}, True), ({"weight": None}, None),
        ({"train": False}, False), ({"train": True}, True), ({"loss": False}, False), ({"loss": True}, True),
        ({"loss_scale": 0.0}, False), ({"masked": True}, False), ({"mask": False}, True),
        ({"weight": 1, "train": True}, True), ({}, None),
    ],
)  # fmt: skip
def test_flags_say_what_is_trained_on(flag: dict, trained: bool | None) -> None:
    first, last = answers(messages(ASK, {**ANSWER, **flag}, ASK, {**ANSWER, "weight": 1}))
    assert (first.is_trained, last.is_trained) == (trained, True)
    row = sharegpt(("human", "High tide?"), ("gpt", "At noon."))
    row["conversations"] += row["conversations"]
    row["conversations"][1] = row["conversations"][1] | flag
    assert answers(row)[0].is_trained is trained


def test_flags_of_other_turns() -> None:
    assert parse(messages({**ASK, "weight": 0}, ANSWER)).notices == ()
    assert parse(messages({**ASK, "train": True}, ANSWER)).notices == (
        Notice("unused training flag", "of a user turn"),
    )


CALLED = (
    Turn("user", "High tide?"),
    Turn("assistant", None, {"tool_calls": [CALL]}),
    Turn("tool", "12:00"),
    Turn("assistant", "At noon."),
)


@pytest.mark.parametrize(
    "tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])], {"type": ["function"], "function": [SCHEMA]}]
)
@pytest.mark.parametrize("call", [CALL["function"], CALL, [CALL["function"]]])
def test_calls_of_functions_in_sharegpt_are_those_of_openai(tools: object, call: object) -> None:
    row = sharegpt(
        ("human", "High tide?"), ("function_call", json.dumps(call)), ("observation", "12:00"),
        ("gpt", "At noon."), tools=tools,
    )  # fmt: skip
    openai = messages(
        ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "12:00"}, ANSWER,
        tools=TOOLS,
    )  # fmt: skip
    assert parse(row) == parse(openai) == Conversation(CALLED, tuple(TOOLS))


def test_calls_that_follow_a_text_or_one_another_are_one_answer() -> None:
    call = ("function_call", json.dumps(CALL["function"]))
    row = sharegpt(
        ("human", "a"), ("gpt", "Let me look."), call, call, ("observation", "1"), ("observation", "2"),
        ("gpt", "b"),
    )  # fmt: skip
    assert [turn.role for turn in parse(row).turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert parse(row).turns[1] == Turn("assistant", "Let me look.", {"tool_calls": [CALL, CALL]})


def test_reasoning_before_a_call() -> None:
    said = ("function_call", "<think>Which port?</think>\n" + json.dumps(CALL["function"]))
    row = sharegpt(("human", "High tide?"), said, ("observation", "12:00"), ("gpt", "At noon."))
    assert answers(row)[0] == Turn("assistant", None, {"tool_calls": [CALL]}, reasoning="Which port?")
    row["conversations"][1] |= {"value": json.dumps(CALL["function"]), "reasoning": "Which port?"}
    assert answers(row)[0].reasoning == "Which port?"
    row["conversations"][1] |= {"value": said[1]}
    assert "holds reasoning twice" in reason(row)


def test_calls_that_are_written_out_in_the_text() -> None:
    said = "<tool_call>\n" + json.dumps(CALL["function"]) + "\n</tool_call>"
    row = sharegpt(("human", "High tide?"), ("gpt", said), ("tool", "12:00"), ("gpt", "At noon."))
    assert [turn.text for turn in parse(row).turns] == ["High tide?", said, "12:00", "At noon."]
    row["conversations"][1]["value"] = "Hm."
    assert "where no tool was called" in reason(row)


def test_bare_schemas_are_given_what_openai_has_around_them() -> None:
    for row in (
        messages(ASK, ANSWER, functions=[SCHEMA]),
        sharegpt(("human", "a"), ("gpt", "b"), tools=json.dumps([SCHEMA])),
    ):
        assert parse(row).tools == tuple(TOOLS)
        assert parse(row).notices == (Notice("bare tool schema"),)
    assert parse(messages(ASK, ANSWER, tools=[SCHEMA])).tools == (SCHEMA,)
    for none in ("", "[]", [], None, "null"):
        assert parse(messages(ASK, ANSWER, tools=none)).tools == ()


def test_functions_as_openai_had_them() -> None:
    row = messages(
        ASK,
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "tide", "content": "12:00"},
        ANSWER,
    )
    assert parse(row).turns[1] == CALLED[1]
    assert parse(row).turns[2] == Turn("tool", "12:00", {"name": "tide"})


def test_null_and_empty_stay_what_they_are() -> None:
    call, result = {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": None}
    for content, text in ((None, None), ("", ""), ("Hm.", "Hm.")):
        turns = parse(
            messages(ASK, {**call, "content": content}, {**result, "content": content}, ANSWER)
        ).turns
        assert turns[1].text == text and turns[2].text == text
    assert parse(messages({"role": "system", "content": ""}, ASK, ANSWER)).turns[0] == Turn("system", "")


def test_numbers_keep_their_digits_and_strings_stay_strings() -> None:
    written = '{"pay": 1.10, "id": 12345678901234567890, "e": 1e5}'
    call = {"function": {"name": "pay", "arguments": written}}
    row = messages(
        ASK, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "ok"}, ANSWER
    )
    assert parse(row).turns[1].extra["tool_calls"][0]["function"]["arguments"] == written
    text = json.dumps(row).replace(json.dumps(written), written)
    arguments = (
        Format(name="messages").parse(parse_json(text.encode(), Number)).turns[1].extra["tool_calls"][0]
    )
    assert [str(value) for value in arguments["function"]["arguments"].values()] == [
        "1.10",
        "12345678901234567890",
        "1e5",
    ]


def test_what_a_row_gives_to_the_template() -> None:
    said = {"enable_thinking": False}
    for kwargs in (said, json.dumps(said)):
        assert parse(messages(ASK, ANSWER, chat_template_kwargs=kwargs)).template_kwargs == said
    assert "'tools'" in reason(messages(ASK, ANSWER, chat_template_kwargs={"tools": []}))
    assert "must be an object" in reason(messages(ASK, ANSWER, chat_template_kwargs=[1]))


def test_speakers_may_have_other_names() -> None:
    row = sharegpt(("Captain", "High tide?"), ("bot", "At noon."))
    assert parse(row, Captain="user", bot="assistant").turns == ONE_ROUND
    assert "unknown role 'Captain'" in reason(row) and "roles: {Captain: assistant}" in reason(row)
    call = sharegpt(("human", "High tide?"), ("act", json.dumps(CALL)), ("see", "12:00"), ("gpt", "At noon."))
    assert parse(call, act="function_call", see="tool").turns == CALLED


def test_keys_that_are_not_used_are_named() -> None:
    row = messages(
        {**ASK, "name": "Ann", "mood": "calm"}, ANSWER,
        images=["a.png"], rejected="no", id=7, meta={}, videos=[], note=None,
    )  # fmt: skip
    assert set(parse(row).notices) == {
        Notice("unused key", "name of a turn (who speaks)"),
        Notice("unknown key", "mood of a turn"),
        Notice("unused key", "images (pictures)"),
        Notice("unused key", "rejected (a preference)"),
        Notice("unknown key", "id"),
    }


@pytest.mark.parametrize(
    "mark", ["<|im_start|>", "[INST]", "<start_of_turn>", "<|start_header_id|>", "<｜User｜>"]
)
def test_text_that_is_templated_already(mark: str) -> None:
    notice = Notice("templated text", mark)
    for row in (
        {"text": f"{mark}user\nHigh tide?"},
        {"prompt": f"{mark} High tide?", "completion": "At noon."},
        messages(ASK, {**ANSWER, "content": f"At noon. {mark}"}),
    ):
        assert notice in parse(row).notices
    assert parse({"text": "a <b> [c] | INST"}).notices == ()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (messages(ASK, {**ANSWER, "weight": 0.5}), 'turn 2: "weight" is 0.5; a turn is trained on or not'),
        (messages(ASK, {**ANSWER, "train": "yes"}), "use 0 or 1"),
        (messages(ASK, {**ANSWER, "weight": 0, "loss": True}), "'weight' and 'loss' say different things"),
        (messages(ASK, {**ANSWER, "weight": 0}), "every answer says that it is not trained on"),
        (messages(ASK, {**ANSWER, "thinking": "a", "reasoning": "b"}), "say different things; keep one"),
        (messages(ASK, {**ANSWER, "thinking": ["a"]}), '"thinking" must be a string, not a list'),
        (messages({**ASK, "content": [{"type": "image_url"}]}, ANSWER), "part 1 is of type 'image_url'"),
        (messages({**ASK, "content": ["a", ["b"]]}, ANSWER), "part 1 must be an object, not a string"),
        (messages({**ASK, "content": {"a": 1}}, ANSWER), '"content" must be a list of parts, not an object'),
        (messages({**ASK, "content": []}, ANSWER), "the user's text is empty"),
        ({"messages": "[{"}, "not JSON"),
        ({"messages": "hello"}, "must be a list of turns, not a string"),
        ({"conversations": {"from": ["human"], "value": ["a", "b"]}}, "lists of different lengths"),
        (sharegpt(("human", "a"), ("function_call", "look()")), "not JSON"),
        (sharegpt(("human", "a"), ("function_call", "{}")), 'a call has no "function" with a "name"'),
        (messages(ASK, {**ANSWER, "tool_calls": [CALL], "function_call": {"name": "f"}}), "different things"),
        (messages(ASK, ANSWER, tools=TOOLS, functions=[SCHEMA]), "has both 'tools' and 'functions'"),
        (messages(ASK, ANSWER, tools="[3]"), '"tools" must be a list of objects, not of a number'),
        (messages(ASK, {**ANSWER, "tool_calls": [CALL]}, ASK, ANSWER), "give each result as a turn"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "round 1 must be a question and its"),
        ({"instruction": "a", "output": "b", "history": [["c", ""]]}, "round 1: the assistant's text is"),
        ({"prompt": [ASK], "completion": 3}, '"completion" must be a list of turns, not a number'),
    ],
)  # fmt: skip
def test_refused_with_a_remedy(row: dict, words: str) -> None:
    assert words in reason(row)


def arrow(arguments: dict, *, required: tuple[str, ...] = (), tools: bool = True) -> Conversation:
    properties = {"port": {"type": "string"}, "unit": {"type": "string"}}
    schema = {"name": "tide", "parameters": {"properties": properties, "required": list(required)}}
    row = messages(
        {**ASK, "tool_calls": None},
        {**ANSWER, "tool_calls": [{"id": None, "function": {"name": "tide", "arguments": arguments}}]},
        {"role": "tool", "content": "12:00", "tool_calls": None},
        ANSWER,
        tools=[{"type": "function", "function": schema}] if tools else None,
    )  # fmt: skip
    return Format(name="messages").parse(without_nulls(row))


def test_nulls_of_arrow_only_fill_a_column() -> None:
    def arguments(conversation: Conversation) -> dict:
        return conversation.turns[1].extra["tool_calls"][0]["function"]["arguments"]

    filled = {"port": "Gdynia", "unit": "m", "x": None}
    assert arguments(arrow(filled)) == {"port": "Gdynia", "unit": "m"}
    assert arrow(filled).notices == ()
    given = {"port": "Gdynia", "unit": None}
    assert arguments(arrow(given, required=("unit",))) == given
    with pytest.raises(
        ValueError, match="the argument 'unit' of a call of 'tide' is null, and a column of structs"
    ):
        arrow(given)
    assert arguments(arrow(given, tools=False)) == {"port": "Gdynia"}
    assert arrow(given, tools=False).notices == (Notice("null left out", "in the arguments of tide"),)
    inside = {"port": {"name": "Gdynia", "pier": None}}
    assert arguments(arrow(inside)) == {"port": {"name": "Gdynia"}}
    assert arrow(inside).notices == (Notice("null left out", "inside of arguments of tide"),)


def test_a_column_of_structs_may_hold_turns_of_both_shapes_and_results_without_text() -> None:
    keys = {"role": None, "content": None, "from": None, "value": None, "tool_calls": None}
    call = {**keys, "role": "assistant", "tool_calls": [CALL]}
    turns = [{**keys, **ASK}, call, {**keys, "role": "tool"}, {**keys, "from": "gpt", "value": "At noon."}]
    parsed = Format(name="messages").parse(without_nulls({"messages": turns, "conversations": None}))
    assert [turn.text for turn in parsed.turns] == ["High tide?", None, None, "At noon."]
    for row, words in (({"messages": None}, "not null"), (messages({**keys, "role": "user"}), "not null")):
        with pytest.raises(ValueError, match=words):
            Format(name="messages").parse(without_nulls(row))


def test_bytes_are_refused_as_bytes() -> None:
    with pytest.raises(ValueError, match='"prompt" must be a list of turns, not bytes \\(a binary column'):
        Format(name="prompt-completion").parse({"prompt": b"a", "completion": b"b"})
    with pytest.raises(ValueError, match="bytes"):
        Format(name="text").parse({"text": b"a"})


KEYS = [
    *(
        "reasoning_content",
        "thinking",
        "tool_calls",
        "function_call",
        "tool_call_id",
        "name",
        "weight",
        "masked",
    ),
    *(
        "images",
        "channel",
        "mood",
        "system",
        "tools",
        "functions",
        "chat_template_kwargs",
        "history",
        "label",
    ),
]
LEAF = st.integers(100, 999).map(lambda number: f"leaf{number}")
FUNCTION = st.fixed_dictionaries({"name": LEAF}, optional={"arguments": LEAF | st.dictionaries(LEAF, LEAF)})
VALUE = st.one_of(
    LEAF, st.none(), st.sampled_from([0, 1, True, "", [], {}]), st.lists(LEAF, max_size=2), FUNCTION,
    st.dictionaries(LEAF, LEAF), st.lists(FUNCTION.map(lambda call: {"function": call}), max_size=2),
    st.lists(FUNCTION, max_size=2).map(json.dumps), st.lists(st.tuples(LEAF, LEAF).map(list), max_size=2),
)  # fmt: skip
MORE = st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=3)


@given(more=st.lists(MORE, min_size=4, max_size=4), row=MORE, shape=st.sampled_from(["messages", "prompt"]))
def test_nothing_that_a_row_holds_is_lost_in_silence(more: list[dict], row: dict, shape: str) -> None:
    said = [{"role": who, "content": f"leaf{at}"} for at, who in enumerate(("user", "assistant") * 2)]
    turns = [{**turn, **keys} for turn, keys in zip(said, more, strict=True)]
    chat = {"messages": turns} if shape == "messages" else {"prompt": turns[:3], "completion": turns[3:]}
    try:
        conversation = parse({**row, **chat})
    except ValueError:
        assume(False)
    kept = repr((conversation.turns, conversation.tools, conversation.template_kwargs))
    named = {notice.detail.partition(" (")[0] for notice in conversation.notices}
    for keys, of in [(row, ""), *((turn, " of a turn") for turn in turns)]:
        for key, value in keys.items():
            leaves = re.findall(r"leaf\d+", repr(value))
            assert f"{key}{of}" in named or all(leaf in kept for leaf in leaves), key
