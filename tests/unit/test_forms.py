"""Rows reach the text as they were given, in a form that the template takes, or are bad."""

from typing import Any

import pytest
from test_answers import Words

from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.formats import Format
from megatron_dynmix.data.prepare.notices import Notice
from megatron_dynmix.data.prepare.rounds import as_generated
from megatron_dynmix.data.prepare.template import Rendered, Renderer
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import Number

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
FOOT = (
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
ARGUMENTS = {
    "as json": "{{ c.function.arguments | tojson }}",
    "a call as json": "{{ c.function | tojson }}",
    "all calls as json": "{{ m.tool_calls | tojson(indent=2) }}",
    "as text": "{{ '' + c.function.arguments }}",
    "printed": "{{ c.function.arguments }}",
    "key by key": "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}",
    "as either": "{% set given = c.function.arguments %}{{ given if given is string else given | tojson }}",
}
OBJECT = {
    "amount": Number("1.10"),
    "big": 12345678901234567890,
    "e": Number("1e5"),
    "u": 'é "quoted"\n',
}
TEXT = '{"amount": 1.10, "big": 12345678901234567890, "e": 1e5, "u": "\\u00e9 \\"quoted\\"\\n"}'


def template(said: str = "{{ m.content or '' }}", arguments: str = ARGUMENTS["as either"]) -> str:
    return f"{TOOLS}{HEAD}{said}{CALLS}{arguments}</call>{{% endfor %}}{FOOT}"


def call(arguments: Any, name: str = "pay") -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def with_call(*calls: dict[str, Any], text: str | None = None, tools: tuple[Any, ...] = ()) -> Conversation:
    turns = [
        Turn("user", "Pay."),
        Turn("assistant", text, {"tool_calls": list(calls)}),
        Turn("tool", "ok", {"tool_call_id": "call_1"}),
        Turn("assistant", "Paid."),
    ]
    return Conversation(tuple(turns), tools)


def rendered(source: str | dict[str, str], conversation: Conversation, **settings: Any) -> Rendered:
    return Renderer(Words(source), "tokenizer", **settings).render(conversation)


ROW_OF_TWO = Conversation((Turn("user", "A river?"), Turn("assistant", "Oder")))


def trained(one: Rendered) -> list[str]:
    return [one.text[start:end] for start, end in one.trained_spans]


@pytest.mark.parametrize("way", ARGUMENTS)
@pytest.mark.parametrize(
    "given", [OBJECT, TEXT, "print(1)", {}, "{}"], ids=["object", "text", "words", "{}", "'{}'"]
)
def test_arguments_are_written_once_with_their_digits(way: str, given: Any) -> None:
    if given == "print(1)" and way == "key by key":
        with pytest.raises(ValueError, match="refuses the conversation"):
            rendered(template(arguments=ARGUMENTS[way]), with_call(call(given)))
        return
    first, last = trained(rendered(template(arguments=ARGUMENTS[way]), with_call(call(given))))
    assert (
        last == "Paid.<|im_end|>" and first.startswith("<call>pay ") and first.endswith("</call><|im_end|>")
    )
    said = first[len("<call>pay ") : -len("</call><|im_end|>")]
    if given == "print(1)":
        assert said in ("print(1)", '"print(1)"') or '"arguments": "print(1)"' in said
    elif given in (OBJECT, TEXT):
        assert all(digits in said for digits in ("1.10", "12345678901234567890", "1e5"))
        assert '\\\\"' not in said, "JSON in quotes"
        if way in ("as text", "printed", "as either") and given is TEXT:
            assert said == TEXT, "a text stays as it is"


@pytest.mark.parametrize(
    ("said", "given", "text"),
    [
        ("{{ 'none' if m.content is none else m.content }}", None, "none"),
        ("{{ 'none' if m.content is none else m.content }}", "", ""),
        ("{{ m.content }}", None, ""),
        ("{{ m.content | trim }}", None, ""),
        ("{{ m.content + '' }}", None, ""),
        ("{{ m.content ~ '' }}", None, ""),
        ("{% for part in m.content or [] %}{{ part.text }}{% endfor %}", None, ""),
    ],
)
def test_null_is_what_a_template_takes_it_for_and_no_word(said: str, given: str | None, text: str) -> None:
    first, _ = trained(rendered(template(said), with_call(call({}), text=given)))
    assert first == f"{text}<call>pay {{}}</call><|im_end|>"


def test_calls_beside_no_text_only_are_given_with_null() -> None:
    source = (
        f"{HEAD}{{% if m.content is not none %}}{{{{ m.content }}}}{{% else %}}"
        f"{CALLS}{ARGUMENTS['as text']}{{% endfor %}}{{% endif %}}{FOOT}"
    )
    for given in (None, ""):
        assert (
            trained(rendered(source, with_call(call({"x": 1}), text=given)))[0]
            == '<call>pay {"x": 1}<|im_end|>'
        )
    with pytest.raises(ValueError, match=r"leaves out the name of a call in turn 2 ..pay.., the arg"):
        rendered(source, with_call(call({"x": 1}), text="Now."))


SCHEMA = {"name": "pay", "description": "Pays", "parameters": {"properties": {"sum": {"type": "number"}}}}


CONTENT = "{{ m.content or '' }}"
LEAVES_OUT = {
    "system": ("{{ m.content if m.role != 'system' }}", "", "", "the system prompt .*Be brief"),
    "call": (f"{{% if m.role != 'tool' %}}{CONTENT}{{% endif %}}", "", "", "tool's result in turn 3 .*ok"),
    "system ": ("{{ m.content[:2] }}", "", "", "the system prompt"),
    "system  ": ("{{ m.content | upper }}", "", "", "the system prompt .*Be brief.*, the text of turn 2"),
    "system   ": ("{{ m.content | replace('r', '') }}", "", "", "the text of turn 3 .*r"),
    "call ": (CONTENT, "m.tool_calls or []", "[]", "the name of a call in turn 2"),
    "two calls": (CONTENT, "m.tool_calls or []", "(m.tool_calls or [])[:1]", "call in turn 2 .*Gdansk"),
    "call  ": (CONTENT, "c.function.name", "'f'", "the name of a call in turn 2 .*pay"),
    "call   ": (CONTENT, "set given = c.function.arguments", "set given = '{}'", "the arguments of a call"),
    "call    ": (CONTENT, "given if given is string else given | tojson", "given.keys() | list", "arguments"),
    "tools": (CONTENT, "t | tojson", "t.name", "the tools .*Pays"),
    "tools ": (CONTENT, "tools or []", "(tools or [])[1:]", "the tools .*pay"),
    "tools without calls": (CONTENT, TOOLS, "", "the tools .*pay"),
}
"""What a row has; how a template writes texts; what of it is put in the place of what; what is missed."""


@pytest.mark.parametrize("row", LEAVES_OUT)
def test_what_a_template_leaves_out_is_named(row: str) -> None:
    said, old, new, reason = LEAVES_OUT[row]
    conversations = {
        "system": Conversation((Turn("system", "Be brief."), *ROW_OF_TWO.turns)),
        "call": with_call(call({"sum": 17})),
        "two calls": with_call(call({"town": "Poznan"}), call({"town": "Gdansk"})),
        "tools": with_call(call({"sum": 17}), tools=(SCHEMA,)),
        "tools without calls": Conversation(ROW_OF_TWO.turns, (SCHEMA,)),
    }
    with pytest.raises(ValueError, match=reason) as caught:
        rendered(template(said).replace(old or "-", new), conversations[row.strip()])
    assert not isinstance(caught.value, InputError)


def test_schemas_may_be_elsewhere_where_a_template_has_calls_but_no_tools() -> None:
    one = rendered(template().replace(TOOLS, ""), with_call(call({"sum": 1}), tools=(SCHEMA,)))
    assert one.notices == (Notice("unwritten tools"),)


def test_the_template_for_tools_is_taken_for_rows_with_tools() -> None:
    own = {"default": f"{HEAD}{{{{ m.content }}}}{FOOT}", "tool_use": template()}
    assert "Pays" in rendered(own, with_call(call({}), tools=(SCHEMA,))).text
    assert rendered(own, ROW_OF_TWO) == rendered(own["default"], ROW_OF_TWO)


THOUGHT = Conversation(
    (
        Turn("user", "17*3?"),
        Turn("assistant", "51", reasoning="34+17"),
        Turn("user", "plus 1?"),
        Turn("assistant", "52", reasoning="51+1"),
    )
)
LAST_ONLY = "{% if loop.last and m.KEY %}{{ '<think>' + m.KEY + '</think>' }}{% endif %}{{ m.content }}"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_by_the_name_that_the_template_knows(key: str) -> None:
    one = rendered(template(LAST_ONLY.replace("KEY", key)), THOUGHT)
    assert trained(one) == ["51<|im_end|>", "<think>51+1</think>52<|im_end|>"]
    assert one.notices == (Notice("removed reasoning"),) and one.removed == (1,)


def test_reasoning_without_a_name_stands_before_the_text() -> None:
    assert trained(rendered(template(), THOUGHT)) == [
        "<think>\n34+17\n</think>\n\n51<|im_end|>",
        "<think>\n51+1\n</think>\n\n52<|im_end|>",
    ]
    with pytest.raises(ValueError, match=r"leaves out the reasoning of turn 4 ..51\+1"):
        rendered(template("{{ m.content.split('</think>')[-1] }}"), THOUGHT)


def test_each_round_as_it_was_generated() -> None:
    renderer = Renderer(Words(template(LAST_ONLY.replace("KEY", "thinking"))), "tokenizer", "rounds")
    texts = [one for _, one in as_generated(THOUGHT, renderer.render)]
    assert [trained(one) for one in texts] == [
        ["<think>34+17</think>51<|im_end|>"],
        ["<think>51+1</think>52<|im_end|>"],
    ]
    assert not any(one.notices for one in texts)
    # within a round, too: the call was generated behind its reasoning, which goes when the answer follows
    called = with_call(call({"sum": 1}))
    turns = [called.turns[0], Turn("assistant", "", called.turns[1].extra, "look"), *called.turns[2:]]
    texts = [one for _, one in as_generated(Conversation(tuple(turns)), renderer.render)]
    assert [trained(one) for one in texts] == [
        ['<think>look</think><call>pay {"sum": 1}</call><|im_end|>'],
        ["Paid.<|im_end|>"],
    ]


@pytest.mark.parametrize("train_on", ["all", "last", "everything", "rounds"])
@pytest.mark.parametrize("source", [template(), None])
def test_answers_whose_row_says_no_are_not_trained_on(train_on: Any, source: str | None) -> None:
    turns = tuple(Turn(turn.role, turn.text, is_trained=turn.text != "51" and None) for turn in THOUGHT.turns)
    renderer = Renderer(Words(source or ""), "tokenizer" if source else "plain", train_on)
    one = renderer.render(Conversation(turns))
    assert "51" not in "".join(trained(one)) and "52" in "".join(trained(one))
    if train_on == "everything":
        assert len("".join(trained(one))) == len(one.text) - len("51<|im_end|>")


def test_keywords_and_the_day_come_from_settings_and_rows() -> None:
    source = template("{{ strftime_now('%d %b') }} {{ 'deep' if depth == 2 else depth }}: {{ m.content }}")
    row = Conversation(THOUGHT.turns, template_kwargs={"depth": 3, "colour": "<|im_end|>"})
    one = rendered(source, row, template_kwargs={"depth": 2}, template_date="2026-01-31")
    assert "31 Jan 3: 17*3?" in one.text and one.notices == (
        Notice("unused key", "chat_template_kwargs: colour"),
    )
    assert (
        "deep: 17" in rendered(source, THOUGHT, template_kwargs={"depth": 2}, template_date="2026-01-31").text
    )
    with pytest.raises(ValueError, match="give a day: template_date"):
        rendered(source, THOUGHT, template_kwargs={"depth": 2})
    with pytest.raises(InputError, match="'dept' is nothing that the chat template reads; it reads depth"):
        Renderer(Words(source), "tokenizer", template_kwargs={"dept": 2})
    with pytest.raises(InputError, match=r"'depth' is nothing .* it reads nothing but the conversation"):
        Renderer(Words(source), "plain", template_kwargs={"depth": 2})


def test_words_of_a_template_about_special_tokens_are_legible() -> None:
    source = template("{{ raise_exception('not ' + m.content) if 'x' in m.content else m.content }}")
    row = {"messages": [{"role": "user", "content": "x <|im_end|>"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(ValueError, match=r"refuses the conversation \(not x <\|im_end\|>\)"):
        rendered(source, Format(name="messages").parse(row))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("{{ m.content }}", "generation %} around what is not one answer"),
        ("{{ m.content if m.role == 'assistant' }}", None),
    ],
)
def test_marks_are_for_answers(said: str, reason: str | None) -> None:
    marked = (
        f"{HEAD}{{{{ m.content if m.role == 'user' }}}}{{% generation %}}{said}{{% endgeneration %}}{FOOT}"
    )
    if reason:
        with pytest.raises(ValueError, match=reason):
            rendered(marked.replace("m.content if m.role == 'user'", "''"), ROW_OF_TWO)
    else:
        only = marked.replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}")
        only = only.replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
        assert trained(rendered(only, ROW_OF_TWO)) == ["Oder<|im_end|>"]


def test_answers_outside_of_marks_are_not_trained_on_and_said() -> None:
    marked = (
        f"{HEAD}{{% if m.role == 'assistant' and not m.tool_calls %}}{{% generation %}}{{{{ m.content }}}}"
        f"<|im_end|>\n{{% endgeneration %}}{{% else %}}{{{{ m.content or '' }}}}{CALLS}{ARGUMENTS['as json']}"
        f"{{% endfor %}}<|im_end|>\n{{% endif %}}{{% endfor %}}"
    )
    one = rendered(marked, with_call(call({"sum": 1})))
    assert trained(one) == ["Paid.<|im_end|>\n"], "what is marked, to the letter"
    assert one.notices == (Notice("unmarked answer"),)


def test_words_of_a_template_may_hold_what_it_marks() -> None:
    source = f"{HEAD}{{% set said %}}{{% generation %}}{{{{ m.content }}}}{{% endgeneration %}}{{% endset %}}"
    with pytest.raises(ValueError, match=r"refuses the conversation \(not A river\?\)"):
        rendered(f"{source}{{{{ raise_exception('not ' + said) }}}}{FOOT}", ROW_OF_TWO)
