"""Templates made of choices, so that what they write, and what of it is trained on, is known beforehand."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.template import Renderer
from megatron_dynmix.data.tokenizer.base import Encoding, Tokenizer
from megatron_dynmix.data.tokenizer.special import SpecialTokens

WAYS = {
    "as it is": "{{ '<|im_start|>' + role + '\\n' + content }}",
    "joined": "{{ '<|im_start|>' ~ role ~ '\\n' ~ content }}",
    "a macro": "{% macro say(text) %}{{ text }}{% endmacro %}{% set said = say(content) %}"
    "{{ '<|im_start|>' + role + '\\n' }}{% if said | length %}{{ said }}{% endif %}",
    "a block": "{% set said %}<|im_start|>{{ role }}\n{{ content }}{% endset %}{{ said }}",
    "a list": "{{ ['<|im_start|>' + role + '\\n', content] | join }}",
    "formatted": "{{ '<|im_start|>%s\\n%s' | format(role, content) }}",
    "percent": "{{ '<|im_start|>%s\\n%s' % (role, content) }}",
    "by method": "{{ '<|im_start|>{}\\n{}'.format(role, content) }}",
    "cut and joined": "{{ '<|im_start|>' + role + '\\n' + content.split('a') | join('a') }}",
    "sliced": "{{ '<|im_start|>' + role + '\\n' + content[:2] + content[2:] }}",
}


class Words(Tokenizer):
    """A tokenizer that is asked for its special tokens only."""

    def __init__(self, template: str | dict[str, str]) -> None:
        names = ("<|im_start|>", "<|im_end|>", "<|return|>")
        self.special = SpecialTokens({name: number for number, name in enumerate(names)})
        self.chat_template, self.eos, self.bos, self.fingerprint = template, "<|im_end|>", "", ""

    def encode_batch(self, texts: Sequence[str], *, inside: bool = False) -> list[Encoding]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Kind:
    """A kind of template."""

    way: str = "as it is"
    trims: bool = False
    thinks: str = "never"
    """Whether answers have a block for reasoning: never, all of them, or the last."""
    last_end: str = "<|im_end|>"
    prompt: str = ""
    """What stands behind the role where an answer is asked for."""
    footer: str = ""

    def source(self) -> str:
        content = f"{{% set role, content = m.role, m.content{' | trim' if self.trims else ''} %}}"
        is_thinking = {"never": "false", "all": "true", "last": "loop.last"}[self.thinks]
        thought = "'<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' + content"
        thinking = (
            f"{{% if m.role == 'assistant' and {is_thinking} %}}{{% set content = {thought} %}}{{% endif %}}"
        )
        is_last = "loop.last and role == 'assistant'"
        end = f"{{{{ '{self.last_end}' if {is_last} else '<|im_end|>' }}}}{{{{ '\\n' }}}}"
        prompt = f"<|im_start|>assistant\n{self.prompt}".replace("\n", "\\n")
        asks = f"{{{{ '{prompt}' if add_generation_prompt else '{self.footer}' }}}}"
        return f"{{% for m in messages %}}{content}{thinking}{WAYS[self.way]}{end}{{% endfor %}}{asks}"

    def expected(self, turns: Sequence[Turn]) -> tuple[str, list[str]]:
        text, trained = "", []
        for turn in turns:
            said = (turn.text or "").strip() if self.trims else turn.text or ""
            is_last = turn is turns[-1]
            head = f"<|im_start|>{turn.role}\n"
            end = self.last_end if is_last else "<|im_end|>"
            if turn.role == "assistant" and (self.thinks == "all" or (self.thinks == "last" and is_last)):
                said = f"<think>\n{turn.reasoning or ''}\n</think>\n\n{said}"
            if turn.role == "assistant":
                trained.append(f"{said.removeprefix(self.prompt)}{end}")
            text += f"{head}{said}{end}\n"
        return text + self.footer, trained


KINDS = [
    *(Kind(way, trims) for way, trims in product(WAYS, (False, True))),
    *(Kind(way, thinks=thinks) for way, thinks in product(WAYS, ("all", "last"))),
    Kind(last_end="<|return|>"),
    Kind(thinks="last", last_end="<|return|>"),
    Kind(thinks="all", prompt="<think>\n"),
    Kind(thinks="last", prompt="<think>\n"),
    Kind(prompt="<think>\n"),
    Kind(footer="<|return|>"),
    Kind(trims=True, thinks="all", prompt="<think>\n", last_end="<|return|>"),
]
SAID = st.text(alphabet="ab </think>\n\u2028é", min_size=1, max_size=8).map(lambda text: f"{text}x")
ROUNDS = st.lists(st.tuples(SAID, SAID, st.none() | SAID), min_size=1, max_size=4)


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), rounds=ROUNDS, system=st.none() | SAID)
def test_answers_of_templates_of_many_kinds(
    kind: Kind, rounds: list[tuple[str, str, str | None]], system: str | None
) -> None:
    turns = [Turn("system", system)] if system else []
    for number, (question, answer, reasoning) in enumerate(rounds):
        is_kept = kind.thinks == "all" or (kind.thinks == "last" and number == len(rounds) - 1)
        turns += [Turn("user", question), Turn("assistant", answer, reasoning=reasoning if is_kept else None)]
    rendered = Renderer(Words(kind.source()), "tokenizer").render(Conversation(tuple(turns)))
    text, trained = kind.expected(turns)
    assert rendered.text == text
    assert [rendered.text[start:end] for start, end in rendered.trained_spans] == trained
    # without a place for reasoning the last answer is asked for with more than it is written behind
    kinds = {notice.kind for notice in rendered.notices}
    assert kinds == ({"other prompt"} if kind == Kind(prompt="<think>\n") else set())


@pytest.mark.parametrize("kind", [Kind(), Kind("formatted"), Kind(thinks="last", prompt="<think>\n")])
def test_work_is_linear_in_turns(kind: Kind) -> None:
    """Counted in calls, which no other load of the machine changes."""
    renderer = Renderer(Words(kind.source()), "tokenizer")
    calls = []
    for count in (300, 2400):
        turns = [
            Turn(role, f"{role} says {number}") for number in range(count) for role in ("user", "assistant")
        ]
        conversation, made = Conversation(tuple(turns)), Counter[str]()
        sys.setprofile(lambda frame, event, _, made=made: made.update([event]))
        try:
            rendered = renderer.render(conversation)
        finally:
            sys.setprofile(None)
        assert len(rendered.trained_spans) == count
        calls.append(made.total())
    assert calls[1] < 9 * calls[0], calls
