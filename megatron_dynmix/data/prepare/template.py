"""From a conversation to text, and which characters and tokens of it are trained on.

Shape legend: T tokens of one text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config.run_config import JINJA_SUFFIXES, TrainOn
from megatron_dynmix.data.prepare.conversation import Conversation, Turn, thought
from megatron_dynmix.data.prepare.jinja import compiled
from megatron_dynmix.data.prepare.notices import Notice
from megatron_dynmix.data.prepare.traced import Span
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.errors import InputError
from megatron_dynmix.files import sha256

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
    trained_spans: tuple[Span, ...]
    notices: tuple[Notice, ...] = ()
    removed: tuple[int, ...] = ()
    """The turns whose reasoning the template leaves out."""


@dataclass(frozen=True)
class Renderer:
    """Writes conversations as the text to train on; can be handed to another process.

    Templates: ``vicuna`` is the Vicuna v1.1 format with the tokenizer's own EOS; a system turn takes the
    place of the usual first sentence, and a BOS goes in front where the tokenizer would put one.
    ``chatml`` needs a tokenizer that has its two tokens. ``plain`` is the turns as they are, a newline
    between them and EOS behind each answer. ``tokenizer`` is the template that the tokenizer comes with;
    any other name is the path of a Jinja file. ``template_kwargs`` is what a Jinja template reads beside the
    conversation. ``train_on``: ``all`` answers, the ``last`` one, the answer of rows that have only one
    (``completion``), each round as it was generated (``rounds``), or ``everything``; a text without turns is
    trained on as a whole, and an answer whose row says no is not trained on. The end-of-turn token belongs to
    the answer. An unknown template, ``train_on`` or keyword, or a template that the tokenizer has not, is an
    InputError.
    """

    tokenizer: Tokenizer
    template: str
    train_on: TrainOn = "all"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_date: str | None = None
    """The day, as `2026-01-31`, that a Jinja template is told by `strftime_now`."""
    sources: Mapping[str, str] = field(init=False, repr=False, default_factory=dict)
    """Texts of the Jinja templates by their names, none for one that is built in."""

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
            object.__setattr__(self, "sources", _sources_of(self.template, self.tokenizer))
        if unread := self.template_kwargs.keys() - self._read:
            raise InputError(
                f"template_kwargs: {min(unread)!r} is nothing that the chat template reads; it reads "
                f"{', '.join(sorted(self._read)) or 'nothing but the conversation'}"
            )

    @property
    def _read(self) -> set[str]:
        """What the template reads beside the conversation."""
        return set().union(*(compiled(source).variables for source in self.sources.values()))

    @property
    def fingerprint(self) -> str:
        """A name that changes when the template does, and with what is trained on."""
        name = self.template
        if self.sources and name != "tokenizer":
            name = f"jinja:{sha256(self.sources['default'])}"
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

        A row that cannot be used is a ValueError without a location: the template refuses it, leaves out what
        it says, or does not show where an answer starts or ends.
        """
        turns = conversation.turns
        if turns[0].role == "text":
            bos, text = self.tokenizer.bos, self.tokenizer.special.guard(turns[0].text or "")
            whole = f"{bos}{text}{self.tokenizer.eos}"
            return Rendered(whole, ((len(bos), len(whole)),))
        if self.train_on == "completion" and (answers := sum(t.role == "assistant" for t in turns)) > 1:
            raise ValueError(f"has {answers} answers; train_on completion is for rows with one, use last")
        conversation = self._guarded(conversation)
        try:
            rendered = self._jinja(conversation) if self.sources else self._built_in(conversation)
        except ValueError as error:
            raise ValueError(self.tokenizer.special.unguard(str(error))) from error
        unread = conversation.template_kwargs.keys() - self._read
        notices = (Notice("unused key", f"chat_template_kwargs: {key}") for key in sorted(unread))
        return replace(rendered, notices=(*rendered.notices, *notices))

    def _guarded(self, conversation: Conversation) -> Conversation:
        special = self.tokenizer.special

        def guarded(turn: Turn) -> Turn:
            text = None if turn.text is None else special.guard(turn.text)
            reasoning = None if turn.reasoning is None else special.guard(turn.reasoning)
            if text is turn.text and reasoning is turn.reasoning and not turn.extra:
                return turn
            return replace(turn, text=text, reasoning=reasoning, extra=special.guard_json(turn.extra))

        return replace(
            conversation,
            turns=tuple(map(guarded, conversation.turns)),
            tools=tuple(special.guard_json(tool) for tool in conversation.tools),
            template_kwargs=special.guard_json(conversation.template_kwargs),
        )

    def _looked_for(self, turns: Sequence[Turn]) -> list[int]:
        """Return the answers that are trained on, or of a text trained on as a whole those that are not."""
        answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
        if self.train_on == "everything":
            return [at for at in answers if turns[at].is_trained is False]
        wanted = answers[-1:] if self.train_on == "last" else answers
        return [at for at in wanted if turns[at].is_trained is not False]

    def _rendered(self, text: str, spans: Sequence[Span], **more: Any) -> Rendered:
        """Return a text whose answers that were looked for are these spans."""
        if self.train_on == "everything":
            borders = [0, *chain(*spans), len(text)]
            spans = [
                (start, end) for start, end in zip(borders[::2], borders[1::2], strict=True) if start < end
            ]
        return Rendered(text, tuple(spans), **more)

    def _built_in(self, conversation: Conversation) -> Rendered:
        if conversation.tools or any(turn.extra for turn in conversation.turns):
            raise ValueError(f"uses tools, which the template {self.template} has no words for")
        texts = [
            (turn.text or "") if turn.reasoning is None else thought(turn.reasoning, turn.text or "")
            for turn in conversation.turns
        ]
        turns = [replace(turn, text=text) for turn, text in zip(conversation.turns, texts, strict=True)]
        write = {"vicuna": _vicuna, "chatml": _chatml, "plain": _plain}[self.template]
        whole, spans = self.tokenizer.bos, []
        for text, is_answer in write(turns, self.tokenizer.eos):
            if is_answer:
                spans.append((len(whole), len(whole) + len(text)))
            whole += text
        answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
        span_of = dict(zip(answers, spans, strict=True))
        return self._rendered(whole, [span_of[at] for at in self._looked_for(turns)])

    def _jinja(self, conversation: Conversation) -> Rendered:
        # a run of prepared sources needs the name of a template only
        from megatron_dynmix.data.prepare.answers import asked_answers, marked_answers
        from megatron_dynmix.data.prepare.page import write

        use = "tool_use" if conversation.tools and "tool_use" in self.sources else "default"
        template = compiled(self.sources[use])
        page, seen = write(template, {**self._names, **conversation.template_kwargs}, conversation)
        wanted = self._looked_for(conversation.turns)
        find = marked_answers if template.has_generation else asked_answers
        spans, notices = find(page, wanted, self.tokenizer)
        removed = tuple(page.given.parts[number].turn for number in seen.removed)
        if removed:
            notices.append(Notice("removed reasoning"))
        if seen.unwritten_tools:
            notices.append(Notice("unwritten tools"))
        return self._rendered(page.placed.text, spans, notices=tuple(notices), removed=removed)


def _sources_of(template: str, tokenizer: Tokenizer) -> dict[str, str]:
    if template != "tokenizer":
        if Path(template).suffix not in JINJA_SUFFIXES:
            raise InputError(
                f"template {template!r} is unknown; use tokenizer, {', '.join(BUILT_IN)}, or the path of a "
                ".jinja file"
            )
        try:
            return {"default": Path(template).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"template {template}: cannot be read ({error})") from error
    own = tokenizer.chat_template
    own = own if isinstance(own, dict) else {"default": own or ""}
    if not own.get("default"):
        raise InputError("the tokenizer has no chat template; use the template vicuna")
    return {name: own[name] for name in ("default", "tool_use") if name in own}


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
        yield f"{turn.text}{eos}" if is_answer else f"{turn.text}\n", is_answer


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
