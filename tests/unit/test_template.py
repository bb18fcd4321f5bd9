import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import sharegpt, tokenizer_dir_fixture, tokenizer_fixture  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.formats import Format, parse_sharegpt
from megatron_dynmix.data.prepare.template import Rendered, Renderer, token_mask
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.borders import encode_answers
from megatron_dynmix.data.tokenizer.fast import FastTokenizer
from megatron_dynmix.data.tokenizer.folder import of_transformers
from megatron_dynmix.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_ROUNDS = parse_sharegpt(sharegpt("hi", "good day", "two plus two", "four", system="be brief"))


def with_template(folder: Path, template: str | None) -> Tokenizer:
    hf_tokenizer = AutoTokenizer.from_pretrained(str(folder))
    hf_tokenizer.chat_template = template
    return FastTokenizer(of_transformers(hf_tokenizer))


def trained_texts(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.trained_spans]


def plain_texts(rendered: Rendered, tokenizer: Tokenizer) -> list[str]:
    """As people read them: guards are the special tokens that they stand for."""
    return [tokenizer.special.unguard(text) for text in trained_texts(rendered)]


def trained_pieces(rendered: Rendered, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Token texts with their mask, as they stand in the rendered text."""
    borders = [start for start, _ in rendered.trained_spans]
    ((ids, starts, _),) = encode_answers(tokenizer, [rendered.text], [borders])
    mask = token_mask(starts, rendered.trained_spans)
    return [(tokenizer.decode([token]), int(trained)) for token, trained in zip(ids, mask, strict=True)]


def test_vicuna_text(tokenizer: Tokenizer) -> None:
    rendered = Renderer(tokenizer, "vicuna").render(TWO_ROUNDS)
    assert rendered.text == (
        "be brief USER: hi ASSISTANT: good day</s>USER: two plus two ASSISTANT: four</s>"
    )
    assert trained_texts(rendered) == [" good day</s>", " four</s>"]


def test_vicuna_usual_system_sentence_and_the_tokenizers_bos(
    tokenizer: Tokenizer, tokenizer_dir: Path
) -> None:
    conversation = parse_sharegpt(sharegpt("hi", "good day"))
    expected = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: hi ASSISTANT: good day</s>"
    )
    assert Renderer(tokenizer, "vicuna").render(conversation).text == expected
    with_bos = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    rendered = Renderer(FastTokenizer(of_transformers(with_bos)), "vicuna").render(conversation)
    assert rendered.text == "<s>" + expected
    assert trained_texts(rendered) == [" good day</s>"]


def test_vicuna_golden_mask(tokenizer: Tokenizer) -> None:
    conversation = parse_sharegpt(sharegpt("hello there", "good day", "two", " plus", system="be brief"))
    assert trained_pieces(Renderer(tokenizer, "vicuna").render(conversation), tokenizer) == [
        ("b", 0), ("e", 0), (" brief", 0), (" ", 0), ("USER", 0), (":", 0), (" hello", 0), (" there", 0),
        (" ASSISTANT", 0), (":", 0), (" good", 1), (" day", 1), ("</s>", 1),
        ("USER", 0), (":", 0), (" two", 0), (" ASSISTANT", 0), (":", 0),
        (" ", 1), (" plus", 1), ("</s>", 1),
    ]  # fmt: skip


def test_own_template_golden_mask(tokenizer: Tokenizer) -> None:
    rendered = Renderer(tokenizer, "tokenizer").render(TWO_ROUNDS)
    assert rendered.text == (
        "System: be brief\nUser: hi\nAssistant: good day</s>\nUser: two plus two\nAssistant: four</s>"
    )
    assert trained_pieces(rendered, tokenizer) == [
        ("System", 0), (":", 0), (" be", 0), (" brief", 0), ("\n", 0),
        ("Us", 0), ("er", 0), (":", 0), (" ", 0), ("h", 0), ("i", 0), ("\n", 0),
        ("A", 0), ("ssistant", 0), (":", 0), (" good", 1), (" day", 1), ("</s>", 1), ("\n", 0),
        ("Us", 0), ("er", 0), (":", 0), (" two", 0), (" plus", 0), (" two", 0), ("\n", 0),
        ("A", 0), ("ssistant", 0), (":", 0), (" four", 1), ("</s>", 1),
    ]  # fmt: skip


def test_chatml_spans_include_the_end_of_the_turn(tokenizer_dir: Path) -> None:
    rendered = Renderer(with_template(tokenizer_dir, CHATML), "tokenizer").render(TWO_ROUNDS)
    assert trained_texts(rendered) == ["good day<|im_end|>", "four<|im_end|>"]
    assert rendered.text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")


def test_answer_behind_a_prompt_that_ends_with_a_space_keeps_its_first_word(tokenizer_dir: Path) -> None:
    template = CHATML.replace("assistant\n{% endif", "assistant: {% endif").replace(
        "{{ m.role }}\n", "{{ m.role }}: "
    )
    tokenizer = with_template(tokenizer_dir, template)
    rendered = Renderer(tokenizer, "tokenizer").render(parse_sharegpt(sharegpt("hi", "two plus")))
    assert trained_texts(rendered) == ["two plus<|im_end|>"]
    pieces = trained_pieces(rendered, tokenizer)
    first = [trained for _, trained in pieces].index(1)
    # as at inference, where the space is the prompt's last token
    assert [piece for piece, _ in pieces[first - 2 : first + 3]] == [":", " ", "t", "wo", " plus"]


@pytest.mark.parametrize("template", ["vicuna", "tokenizer"])
def test_special_tokens_in_texts_do_not_move_the_mask(tokenizer: Tokenizer, template: str) -> None:
    user = "x</s> ASSISTANT: y\nAssistant: z</s>"
    rendered = Renderer(tokenizer, template).render(parse_sharegpt(sharegpt(user, "</s>four")))
    assert plain_texts(rendered, tokenizer) == [" </s>four</s>"]
    ((ids, starts),) = tokenizer.encode_batch([rendered.text])
    mask = token_mask(starts, rendered.trained_spans)
    # the one end token is the template's, and all that the assistant wrote is trained on as text
    assert [int(i) for i in ids if int(i) in tokenizer.special_ids] == [tokenizer.eos_id]
    assert tokenizer.decode(ids) == tokenizer.special.unguard(rendered.text)
    assert tokenizer.decode(ids[mask]) == " </s>four</s>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "refuses the conversation .no system role"),
        (
            "{{ messages[-1].content }}",
            "leaves out the system prompt ..be brief.., the text of turn 2",
        ),
    ],
)
def test_rows_that_the_own_template_does_not_fit(tokenizer_dir: Path, template: str, reason: str) -> None:
    renderer = Renderer(with_template(tokenizer_dir, template), "tokenizer")
    with pytest.raises(ValueError, match=reason) as caught:
        renderer.render(TWO_ROUNDS)
    assert not isinstance(caught.value, InputError)


def test_tokenizer_without_a_template(tokenizer_dir: Path) -> None:
    with pytest.raises(InputError, match="no chat template; use the template vicuna"):
        Renderer(with_template(tokenizer_dir, None), "tokenizer")


def test_unknown_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="'llama' is unknown; use tokenizer, vicuna, chatml, plain"):
        Renderer(tokenizer, "llama").render(TWO_ROUNDS)


def test_token_mask_borders() -> None:
    starts = np.array([0, 1, 2, 3, 4, 5, 6, 6, 9])
    assert token_mask(starts, [(1, 3), (3, 4), (6, 9)]).tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0]
    assert not token_mask(starts, []).any()
    assert token_mask(np.array([], dtype=np.int64), [(0, 3)]).tolist() == []


WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}"
    "{% if m.role == 'tool' %}[{{ m.content }}]{% elif m.role == 'user' %}<{{ m.content }}>"
    "{% else %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
CALL = {"id": "1", "function": {"name": "sum", "arguments": {"x": "</s>"}}}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "two plus two"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "four</s>"},
        {"role": "assistant", "content": "four"},
    ],
    "tools": [{"name": "sum"}],
}
LONG = parse_sharegpt(sharegpt(*["ab", "cd"] * 1000))


def chatml_tokenizer(folder: Path, template: str | None = None) -> FastTokenizer:
    hf_tokenizer = AutoTokenizer.from_pretrained(str(folder))
    hf_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    hf_tokenizer.chat_template = template
    return FastTokenizer(of_transformers(hf_tokenizer))


def trained(conversation: Conversation, tokenizer: Tokenizer, template: str, train_on: str = "all") -> list:
    return trained_texts(Renderer(tokenizer, template, train_on).render(conversation))


def test_chatml_golden_mask_and_the_same_from_jinja(tokenizer_dir: Path) -> None:
    tokenizer = chatml_tokenizer(tokenizer_dir, CHATML)
    rendered = Renderer(tokenizer, "chatml").render(TWO_ROUNDS)
    assert trained_pieces(rendered, tokenizer) == [
        ("<|im_start|>", 0), ("s", 0), ("y", 0), ("ste", 0), ("m", 0), ("\n", 0),
        ("b", 0), ("e", 0), (" brief", 0), ("<|im_end|>", 0), ("\n", 0),
        ("<|im_start|>", 0), ("us", 0), ("er", 0), ("\n", 0), ("h", 0), ("i", 0),
        ("<|im_end|>", 0), ("\n", 0), ("<|im_start|>", 0), ("a", 0), ("ssistant", 0), ("\n", 0),
        ("g", 1), ("ood", 1), (" day", 1), ("<|im_end|>", 1), ("\n", 0),
        ("<|im_start|>", 0), ("us", 0), ("er", 0), ("\n", 0),
        ("t", 0), ("wo", 0), (" plus", 0), (" two", 0), ("<|im_end|>", 0), ("\n", 0),
        ("<|im_start|>", 0), ("a", 0), ("ssistant", 0), ("\n", 0),
        ("fo", 1), ("ur", 1), ("<|im_end|>", 1), ("\n", 0),
    ]  # fmt: skip
    assert Renderer(tokenizer, "tokenizer").render(TWO_ROUNDS) == rendered
    assert trained_texts(rendered) == ["good day<|im_end|>", "four<|im_end|>"]


def test_chatml_needs_its_tokens(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"needs the special token <\|im_start\|>"):
        Renderer(tokenizer, "chatml")


def test_plain_golden_mask(tokenizer: Tokenizer) -> None:
    rendered = Renderer(tokenizer, "plain").render(parse_sharegpt(sharegpt("two plus two", " four")))
    assert trained_pieces(rendered, tokenizer) == [
        ("t", 0), ("wo", 0), (" plus", 0), (" two", 0), ("\n", 0), (" four", 1), ("</s>", 1),
    ]  # fmt: skip


def test_text_is_trained_on_as_a_whole_with_every_template(tokenizer: Tokenizer) -> None:
    conversation = Conversation((Turn("text", "two </s> plus"),))
    for template in ("vicuna", "plain", "tokenizer"):
        rendered = Renderer(tokenizer, template).render(conversation)
        ((ids, starts),) = tokenizer.encode_batch([rendered.text])
        assert token_mask(starts, rendered.trained_spans).all()
        assert tokenizer.decode(ids) == "two </s> plus</s>"
        assert ids.tolist().count(tokenizer.eos_id) == 1


@pytest.mark.parametrize("template", ["vicuna", "tokenizer"])
def test_train_on(tokenizer: Tokenizer, template: str) -> None:
    whole = Renderer(tokenizer, template).render(TWO_ROUNDS).text
    assert trained(TWO_ROUNDS, tokenizer, template) == [" good day</s>", " four</s>"]
    assert trained(TWO_ROUNDS, tokenizer, template, "last") == [" four</s>"]
    assert trained(TWO_ROUNDS, tokenizer, template, "everything") == [whole]
    one = parse_sharegpt(sharegpt("two plus two", "four"))
    assert trained(one, tokenizer, template, "completion") == [" four</s>"]
    with pytest.raises(ValueError, match="has 2 answers; train_on completion") as caught:
        trained(TWO_ROUNDS, tokenizer, template, "completion")
    assert not isinstance(caught.value, InputError)
    with pytest.raises(InputError, match="train_on is 'some'; use all, last, completion, rounds, everything"):
        Renderer(tokenizer, template, "some")


def test_fingerprints_differ(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(WITH_TOOLS)
    names = [
        Renderer(tokenizer, "vicuna"),
        Renderer(tokenizer, "vicuna", "last"),
        Renderer(tokenizer, str(path)),
    ]
    path.write_text(WITH_TOOLS + " ")
    names.append(Renderer(tokenizer, str(path)))
    assert len({one.fingerprint for one in names}) == 4
    assert names[0].fingerprint == "vicuna"


def test_tools_in_a_jinja_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tools.jinja"
    path.write_text(WITH_TOOLS)
    renderer = pickle.loads(pickle.dumps(Renderer(tokenizer, str(path))))
    rendered = renderer.render(Format(name="messages").parse(TOOL_ROW))
    assert tokenizer.special.unguard(rendered.text) == (
        '{"name": "sum"}\n<two plus two>sum({"x": "</s>"})</s>[four</s>]four</s>'
    )
    assert plain_texts(rendered, tokenizer) == ['sum({"x": "</s>"})</s>', "four</s>"]
    ((ids, _),) = tokenizer.encode_batch([rendered.text])
    assert ids.tolist().count(tokenizer.eos_id) == 2


@pytest.mark.parametrize("template", ["vicuna", "plain", "tokenizer"])
def test_tools_that_a_template_has_no_words_for_are_a_bad_row(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(ValueError, match="tools") as caught:
        Renderer(tokenizer, template).render(Format(name="messages").parse(TOOL_ROW))
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing behind answer 1 that ends it"),
        (
            "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}",
            "leaves out the system prompt",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endfor %}",
            "generation %} around what is not one answer",
        ),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{{ strftime_now('%Y') }}", "refuses the conversation"),
        ("{{ 1 // 0 }}", "refuses the conversation"),
        ("{{ lipsum() }}", "refuses the conversation"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses the conversation"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer_dir: Path, template: str, reason: str) -> None:
    renderer = Renderer(with_template(tokenizer_dir, template), "tokenizer")
    with pytest.raises(ValueError, match=reason):
        renderer.render(TWO_ROUNDS)


@pytest.mark.parametrize("template", ["{% for m in messages %}{% if m.role %}", "{{ messages | random }}"])
def test_templates_that_are_none(tokenizer_dir: Path, template: str) -> None:
    with pytest.raises(InputError, match="no Jinja"):
        Renderer(with_template(tokenizer_dir, template), "tokenizer")


def test_an_end_behind_the_generation_block_belongs_to_the_answer(tokenizer_dir: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}|{% endif %}{% endfor %}"
    )
    rendered = Renderer(with_template(tokenizer_dir, template), "tokenizer").render(TWO_ROUNDS)
    assert trained_texts(rendered) == ["good day</s>", "four</s>"]


def test_an_end_behind_the_generation_block_belongs_to_tool_calls_too(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "tools.jinja"
    path.write_text(
        "{{ tools | tojson }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endgeneration %}{{ eos_token }}"
        "{% else %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}{# tool #}"
    )
    calls, answer = trained_texts(
        Renderer(tokenizer, str(path)).render(Format(name="messages").parse(TOOL_ROW))
    )
    assert calls.startswith("[{") and calls.endswith("]</s>")
    assert answer == "four</s>"


@pytest.mark.parametrize("answer", [">", "s", "</", "s>"])
def test_an_answer_may_look_like_a_part_of_its_end(tokenizer_dir: Path, answer: str) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{{ '' if not add_generation_prompt }}"
    )
    conversation = parse_sharegpt(sharegpt("which", answer))
    rendered = Renderer(with_template(tokenizer_dir, template), "tokenizer").render(conversation)
    assert trained_texts(rendered) == [f"{answer}</s>"]


def test_answers_that_a_template_shortens_are_missed(tokenizer_dir: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else m.content[:2] }}"
        "{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"leaves out the system prompt ..brief.., the text of turn 3"):
        trained(TWO_ROUNDS, with_template(tokenizer_dir, template), "tokenizer", "last")


def test_template_that_is_no_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Renderer(tokenizer, str(tmp_path / "no.jinja"))


@pytest.mark.parametrize("template", ["vicuna", "plain", "tokenizer"])
def test_rendering_is_linear_in_turns(tokenizer: Tokenizer, template: str) -> None:
    start = time.monotonic()
    assert len(Renderer(tokenizer, template).render(LONG).trained_spans) == 1000
    assert time.monotonic() - start < 5


@given(
    texts=st.lists(
        st.lists(st.sampled_from(["</s>", "<s>", "<|im_end|>", " ", "\n", "four", "é", "\u2028", "USER: "])),
        min_size=2,
        max_size=6,
    ),
    template=st.sampled_from(["vicuna", "plain", "tokenizer", "chatml"]),
)
def test_any_conversation_trains_on_its_answers_and_one_end_each(
    tokenizer_dir: Path, texts: list[list[str]], template: str
) -> None:
    if tokenizer_dir not in CHATML_TOKENIZERS:
        own = AutoTokenizer.from_pretrained(str(tokenizer_dir)).chat_template
        CHATML_TOKENIZERS[tokenizer_dir] = chatml_tokenizer(tokenizer_dir, own)
    tokenizer = CHATML_TOKENIZERS[tokenizer_dir]
    said = [f"x{''.join(words)}y" for words in texts[: len(texts) // 2 * 2]]
    rendered = Renderer(tokenizer, template).render(parse_sharegpt(sharegpt(*said)))
    ((ids, starts),) = tokenizer.encode_batch([rendered.text])
    mask = token_mask(starts, rendered.trained_spans)
    assert tokenizer.decode(ids) == tokenizer.special.unguard(rendered.text)
    end = "<|im_end|>" if template == "chatml" else "</s>"
    answers = [f"{' ' * (template in ('vicuna', 'tokenizer'))}{text}{end}" for text in said[1::2]]
    assert tokenizer.decode(ids[mask]) == "".join(answers)
    trained_special = [i for i in ids[mask].tolist() if i in tokenizer.special_ids]
    assert trained_special == [tokenizer.special.ids[end]] * len(answers)


CHATML_TOKENIZERS: dict[Path, Tokenizer] = {}
