from pathlib import Path

import numpy as np
import pytest
from data_fixtures import sharegpt, tokenizer_dir_fixture, tokenizer_fixture  # noqa: F401
from tokenizers import processors
from transformers import AutoTokenizer

from megatron_dynmix.data.conversation import parse_sharegpt
from megatron_dynmix.data.template import Rendered, render, token_mask
from megatron_dynmix.data.tokenizer import Tokenizer
from megatron_dynmix.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_ROUNDS = parse_sharegpt(sharegpt("hi", "good day", "two plus two", "four", system="be brief"))


def with_template(folder: Path, template: str | None) -> Tokenizer:
    hf_tokenizer = AutoTokenizer.from_pretrained(str(folder))
    hf_tokenizer.chat_template = template
    return Tokenizer(hf_tokenizer)


def trained_texts(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.trained_spans]


def trained_pieces(rendered: Rendered, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Token texts with their mask, as they stand in the rendered text."""
    ((ids, starts),) = tokenizer.encode_batch([rendered.text])
    mask = token_mask(starts, rendered.trained_spans)
    return [(tokenizer.decode([token]), int(trained)) for token, trained in zip(ids, mask, strict=True)]


def test_vicuna_text(tokenizer: Tokenizer) -> None:
    rendered = render(TWO_ROUNDS, tokenizer, "vicuna")
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
    assert render(conversation, tokenizer, "vicuna").text == expected
    with_bos = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    rendered = render(conversation, Tokenizer(with_bos), "vicuna")
    assert rendered.text == "<s>" + expected
    assert trained_texts(rendered) == [" good day</s>"]


def test_vicuna_golden_mask(tokenizer: Tokenizer) -> None:
    conversation = parse_sharegpt(sharegpt("hello there", "good day", "two", " plus", system="be brief"))
    assert trained_pieces(render(conversation, tokenizer, "vicuna"), tokenizer) == [
        ("b", 0), ("e", 0), (" brief", 0), (" ", 0), ("USER", 0), (":", 0), (" hello", 0), (" there", 0),
        (" ASSISTANT", 0), (":", 0), (" good", 1), (" day", 1), ("</s>", 1),
        ("USER", 0), (":", 0), (" two", 0), (" ASSISTANT", 0), (":", 0),
        (" ", 1), (" plus", 1), ("</s>", 1),
    ]  # fmt: skip


def test_own_template_golden_mask(tokenizer: Tokenizer) -> None:
    rendered = render(TWO_ROUNDS, tokenizer, "tokenizer")
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
    rendered = render(TWO_ROUNDS, with_template(tokenizer_dir, CHATML), "tokenizer")
    assert trained_texts(rendered) == ["good day<|im_end|>\n", "four<|im_end|>\n"]
    assert rendered.text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")


def test_answer_behind_a_prompt_that_ends_with_a_space_keeps_its_first_word(tokenizer_dir: Path) -> None:
    template = CHATML.replace("assistant\n{% endif", "assistant: {% endif").replace(
        "{{ m.role }}\n", "{{ m.role }}: "
    )
    tokenizer = with_template(tokenizer_dir, template)
    rendered = render(parse_sharegpt(sharegpt("hi", "two plus")), tokenizer, "tokenizer")
    assert trained_texts(rendered) == ["two plus<|im_end|>\n"]
    trained = [piece for piece, mask in trained_pieces(rendered, tokenizer) if mask]
    assert trained[:2] == [" two", " plus"]


@pytest.mark.parametrize("template", ["vicuna", "tokenizer"])
def test_special_tokens_in_texts_do_not_move_the_mask(tokenizer: Tokenizer, template: str) -> None:
    user = "x</s> ASSISTANT: y\nAssistant: z</s>"
    rendered = render(parse_sharegpt(sharegpt(user, "</s>four")), tokenizer, template)
    assert trained_texts(rendered) == [" </s>four</s>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system role') }}", "refuses the conversation .no system role"),
        ("{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}", "turn 3 differently"),
        ("{{ messages[-1].content }}", "differently"),
    ],
)
def test_own_template_that_does_not_fit(tokenizer_dir: Path, template: str | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        render(TWO_ROUNDS, with_template(tokenizer_dir, template), "tokenizer")
    assert "use the template vicuna" in str(caught.value)


def test_unknown_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="'llama' is unknown; use vicuna or tokenizer"):
        render(TWO_ROUNDS, tokenizer, "llama")


def test_token_mask_borders() -> None:
    starts = np.array([0, 1, 2, 3, 4, 5, 6, 6, 9])
    assert token_mask(starts, [(1, 3), (3, 4), (6, 9)]).tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0]
    assert not token_mask(starts, []).any()
    assert token_mask(np.array([], dtype=np.int64), [(0, 3)]).tolist() == []
