"""From a conversation to text, and which characters and tokens of it are trained on.

Shape legend: T tokens of one text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from megatron_dynmix.config.tree import Template
from megatron_dynmix.data.conversation import Conversation
from megatron_dynmix.data.tokenizer import Tokenizer
from megatron_dynmix.errors import InputError

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Rendered:
    """A text and the half-open character ranges of it that are trained on, in order and disjoint."""

    text: str
    trained_spans: tuple[tuple[int, int], ...]


def render(conversation: Conversation, tokenizer: Tokenizer, template: Template) -> Rendered:
    """Write a conversation as the text to train on; assistant turns with their end are trained.

    ``vicuna`` is the Vicuna v1.1 format with the tokenizer's own EOS; a system turn takes the place
    of the usual first sentence, and a BOS goes in front where the tokenizer would put one.
    ``tokenizer`` is the Jinja template in the tokenizer's folder.

    Raises:
        InputError: an unknown template; the tokenizer has none, or it refuses the conversation or
            rewrites earlier turns, so that it does not show where an answer starts.

    """
    if template == "vicuna":
        return _render_vicuna(conversation, tokenizer)
    if template == "tokenizer":
        return _render_own(conversation, tokenizer)
    raise InputError(f"template {template!r} is unknown; use vicuna or tokenizer")


def _render_vicuna(conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    eos = tokenizer.eos
    turns = list(conversation.turns)
    system = turns.pop(0).text if turns[0].role == "system" else _VICUNA_SYSTEM
    pieces = [f"{tokenizer.bos}{system} "]
    length = len(pieces[0])
    spans = []
    for turn in turns:
        if turn.role == "assistant":
            piece = f"ASSISTANT: {turn.text}{eos}"
            spans.append((length + len("ASSISTANT:"), length + len(piece)))
        else:
            piece = f"USER: {turn.text} "
        pieces.append(piece)
        length += len(piece)
    return Rendered("".join(pieces), tuple(spans))


def _render_own(conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    if not tokenizer.has_chat_template:
        raise InputError("the tokenizer has no chat template; use the template vicuna")
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
    try:
        text = tokenizer.render_chat(messages, add_generation_prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = tokenizer.render_chat(messages[:index], add_generation_prompt=True)
            upto = tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False)
            if not (upto.startswith(before) and text.startswith(upto)):
                raise InputError(
                    f"the tokenizer's chat template writes turn {index + 1} differently once later turns "
                    "follow or without the generation prompt, so the start of the answer is not known; "
                    "use the template vicuna"
                )
            spans.append((len(before), len(upto)))
    except TemplateError as error:
        raise InputError(
            f"the tokenizer's chat template refuses the conversation ({error}); use the template vicuna"
        ) from error
    return Rendered(text, tuple(spans))


def token_mask(char_starts_T: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return for each token whether it is trained on: whether its first character lies in a span.

    ``char_starts_T`` are starts as :meth:`Tokenizer.encode_batch` gives them, ``spans`` half-open,
    disjoint and in order. The text is tokenised as a whole, so a token may reach over a border.
    """
    if not spans:
        return np.zeros(len(char_starts_T), dtype=bool)
    # borders run start, end, start, end, ...: inside a span an odd number of them lies behind
    borders = np.array(spans, dtype=np.int64).reshape(-1)
    inside_T: NDArray[np.bool_] = np.searchsorted(borders, char_starts_T, side="right") % 2 == 1
    return inside_T
