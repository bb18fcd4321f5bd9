"""From a conversation to text, and which characters and tokens of it are trained on.

Shape legend: T tokens of one text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config.run_config import JINJA_SUFFIXES, TrainOn
from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.jinja import ChatTemplate, compiled
from megatron_dynmix.data.prepare.notices import Notice
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import parse_json, sha256

BUILT_IN = ("vicuna", "chatml", "plain")
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Rendered:
    """A guarded text (see ``special.py``) and the half-open ranges of it that are trained on, in order."""

    text: str
    trained_spans: tuple[tuple[int, int], ...]
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True)
class Renderer:
    """Writes conversations as the text to train on; can be handed to another process.

    Templates: ``vicuna`` is the Vicuna v1.1 format with the tokenizer's own EOS; a system turn takes the
    place of the usual first sentence, and a BOS goes in front where the tokenizer would put one.
    ``chatml`` needs a tokenizer that has its two tokens. ``plain`` is the turns as they are, a newline
    between them and EOS behind each answer. ``tokenizer`` is the template that the tokenizer comes with;
    any other name is the path of a Jinja file. ``train_on``: ``all`` answers, the ``last`` one, the answer
    of rows that have only one (``completion``), or ``everything``; a text without turns is trained on
    as a whole. The end-of-turn token belongs to the answer. An unknown template or ``train_on``, or a
    template that the tokenizer has not, is an InputError.
    """

    tokenizer: Tokenizer
    template: str
    train_on: TrainOn = "all"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_date: str | None = None
    """The day, as `2026-01-31`, that a Jinja template is told by `strftime_now`."""
    source: str | None = field(init=False, repr=False, default=None)
    """Text of the Jinja template, None for one that is built in."""

    def __post_init__(self) -> None:
        if self.train_on not in get_args(TrainOn):
            raise InputError(f"train_on is {self.train_on!r}; use {', '.join(get_args(TrainOn))}")
        if self.template == "chatml":
            if missing := [name for name in _CHATML_TOKENS if name not in self.tokenizer.special.ids]:
                raise InputError(
                    f"template chatml needs the special token {missing[0]}, which the tokenizer has not; use "
                    "vicuna or plain, or add it to the tokenizer"
                )
        elif self.template not in BUILT_IN:
            source = _source_of(self.template, self.tokenizer)
            object.__setattr__(self, "source", source)
            compiled(source)

    @property
    def fingerprint(self) -> str:
        """A name that changes when the template does, and with what is trained on."""
        name = self.template
        if self.source is not None and name != "tokenizer":
            name = f"jinja:{sha256(self.source)}"
        if self.train_on != "all":
            name += f"/{self.train_on}"
        if self.template_kwargs:
            name += f"/{json.dumps(self.template_kwargs, sort_keys=True)}"
        return name if self.template_date is None else f"{name}/{self.template_date}"

    @property
    def _names(self) -> dict[str, Any]:
        """What a Jinja template knows whatever the conversation is."""
        names: dict[str, Any] = {**self.tokenizer.template_names, **self.template_kwargs}
        if self.template_date is not None:
            names["strftime_now"] = datetime.fromisoformat(self.template_date).strftime
        return names

    def render(self, conversation: Conversation) -> Rendered:
        """Return the text of a conversation, and what of it is trained on.

        A template that refuses the conversation, or does not show where an answer starts or ends, is an
        InputError: it is the wrong one for these rows. A row that alone cannot be used (tools that the
        template has no words for, several answers where one is wanted) is a ValueError without a location.
        """
        turns = conversation.turns
        if turns[0].role == "text":
            bos, text = self.tokenizer.bos, self.tokenizer.special.guard(turns[0].text or "")
            whole = f"{bos}{text}{self.tokenizer.eos}"
            return Rendered(whole, ((len(bos), len(whole)),))
        if self.train_on == "completion" and (rounds := sum(t.role == "assistant" for t in turns)) > 1:
            raise ValueError(f"has {rounds} answers; train_on completion is for rows with one, use last")
        guarded = self._guarded(conversation)
        rendered = self._built_in(guarded) if self.template in BUILT_IN else self._jinja(guarded)
        if self.train_on == "everything":
            return replace(rendered, trained_spans=((0, len(rendered.text)),))
        if self.train_on == "last":
            return replace(rendered, trained_spans=rendered.trained_spans[-1:])
        return rendered

    def _guarded(self, conversation: Conversation) -> Conversation:
        special = self.tokenizer.special
        turns = tuple(
            Turn(turn.role, special.guard(turn.text or ""), special.guard_json(turn.extra))
            for turn in conversation.turns
        )
        tools = tuple(special.guard_json(tool) for tool in conversation.tools)
        return replace(conversation, turns=turns, tools=tools)

    def _built_in(self, conversation: Conversation) -> Rendered:
        if conversation.tools or any(turn.extra for turn in conversation.turns):
            raise ValueError(f"uses tools, which the template {self.template} has no words for")
        write = {"vicuna": _vicuna, "chatml": _chatml, "plain": _plain}[self.template]
        whole, spans = self.tokenizer.bos, []
        for text, is_trained in write(conversation.turns, self.tokenizer.eos):
            if is_trained:
                spans.append((len(whole), len(whole) + len(text)))
            whole += text
        return Rendered(whole, tuple(spans))

    def _jinja(self, conversation: Conversation) -> Rendered:
        assert self.source is not None, "read at construction"
        template = compiled(self.source)
        messages: list[dict[str, Any]] = [
            {"role": turn.role, "content": turn.text, **_with_objects(turn.extra)}
            for turn in conversation.turns
        ]
        _refuse_unknown_tools(template, messages, conversation)
        given: Mapping[str, Any] = {
            "tools": conversation.tools,
            "names": {**self._names, **conversation.template_kwargs},
        }
        answers = [at for at, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        # Answers that are not trained on may change as turns follow: templates for reasoning shorten them.
        wanted = {"last": answers[-1:], "everything": []}.get(self.train_on, answers)
        try:
            text, spans = template.render(messages, **given)
            if not template.has_generation:
                spans = _spans_by_prefixes(template, messages, wanted, text, given)
            elif len(spans) == len(answers):
                spans = spans[len(answers) - len(wanted) :]
            else:
                raise InputError(
                    f"the chat template marks {len(spans)} answers with generation where there are "
                    f"{len(answers)}"
                )
        except InputError as error:
            raise InputError(f"{error}; use the template vicuna, or correct it") from error
        ended = [
            self._with_end(text, span, conversation.turns[at], answers.index(at) + 1)
            for span, at in zip(spans, wanted, strict=True)
        ]
        return Rendered(text, tuple(ended))

    def _with_end(self, text: str, span: tuple[int, int], turn: Turn, number: int) -> tuple[int, int]:
        """Return the span of an answer with its end-of-turn token, and without space behind that."""
        start, end = span
        said = (turn.text or "").strip()
        if said not in text[start:end]:
            raise InputError(
                f"the chat template does not write answer {number} as it is; use the template vicuna, or "
                "correct it"
            )
        answer, names = text[start:end].rstrip(), self.tokenizer.special.texts
        calls_tools = bool(turn.extra)
        if not answer.endswith(names) and (answer.endswith(said) or calls_tools):
            if follows := next((name for name in names if text.startswith(name, end)), ""):
                return start, end + len(follows)
            if not (calls_tools and answer):
                raise InputError(
                    f"the chat template writes nothing behind answer {number} that ends it, so no end would "
                    "be learnt; use the template vicuna, or let it write eos_token there"
                )
        return start, start + len(answer)


def _with_objects(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = []
    for call in extra.get("tool_calls", ()):
        function, arguments = call["function"], call["function"].get("arguments")
        if isinstance(arguments, str):
            arguments = parse_json(arguments.encode())
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**extra, "tool_calls": calls} if calls else extra


def _source_of(template: str, tokenizer: Tokenizer) -> str:
    if template != "tokenizer":
        if Path(template).suffix not in JINJA_SUFFIXES:
            raise InputError(
                f"template {template!r} is unknown; use tokenizer, {', '.join(BUILT_IN)}, or the path of a "
                ".jinja file"
            )
        try:
            return Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"template {template}: cannot be read ({error})") from error
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if not own:
        raise InputError("the tokenizer has no chat template; use the template vicuna")
    return own


def _vicuna(turns: Sequence[Turn], eos: str) -> Iterator[tuple[str, bool]]:
    has_system = turns[0].role == "system"
    yield f"{turns[0].text if has_system else _VICUNA_SYSTEM} ", False
    for turn in turns[has_system:]:
        if turn.role == "assistant":
            yield "ASSISTANT:", False
            # the space belongs to the answer, so that its first word keeps the token it has in running text
            yield f" {turn.text}{eos}", True
        else:
            yield f"USER: {turn.text} ", False


def _chatml(turns: Sequence[Turn], eos: str) -> Iterator[tuple[str, bool]]:
    start, end = _CHATML_TOKENS
    for turn in turns:
        yield f"{start}{turn.role}\n", False
        yield f"{turn.text}{end}", turn.role == "assistant"
        yield "\n", False


def _plain(turns: Sequence[Turn], eos: str) -> Iterator[tuple[str, bool]]:
    for turn in turns:
        is_answer = turn.role == "assistant"
        yield (turn.text or "") + (eos if is_answer else "\n"), is_answer


def _refuse_unknown_tools(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], conversation: Conversation
) -> None:
    used = {
        "tools": bool(conversation.tools),
        "tool_calls": any("tool_calls" in message for message in messages),
        "tool": any(message["role"] == "tool" for message in messages),
    }
    for name, is_used in used.items():
        if is_used and not template.knows(name):
            raise ValueError(f"has {name}, which the chat template does not speak of")


def _spans_by_prefixes(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    answers: Sequence[int],
    text: str,
    given: Mapping[str, Any],
) -> tuple[tuple[int, int], ...]:
    """Return where each of these answers stands: between the text up to it and the text with it.

    One rendering for each border, so the time grows with the square of the turns; `{% generation %}` in
    the template spares that.
    """
    spans = []
    for index in answers:
        before, _ = template.render(messages[:index], add_generation_prompt=True, **given)
        upto, _ = template.render(messages[: index + 1], **given)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise InputError(
                f"the chat template writes turn {index + 1} differently once later turns follow or without "
                "the generation prompt, so the start of the answer is not known"
            )
        spans.append((len(before), len(upto)))
    return tuple(spans)


def token_mask(char_starts_T: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return for each token whether it is trained on: whether its first character lies in a span.

    ``char_starts_T`` are starts as :meth:`Tokenizer.encode_batch` gives them, ``spans`` half-open,
    disjoint and in order. The text is tokenized as a whole, so a token may reach over a border.
    """
    if not spans:
        return np.zeros(len(char_starts_T), dtype=bool)
    # borders run start, end, start, end, ...: inside a span an odd number of them lies behind
    borders = np.array(spans, dtype=np.int64).reshape(-1)
    inside_T: NDArray[np.bool_] = np.searchsorted(borders, char_starts_T, side="right") % 2 == 1
    return inside_T
