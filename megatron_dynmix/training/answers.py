"""Short answers that can be checked: greedy generation from held-out prompts, exact match.

Axes: B prompts, S positions, V vocabulary.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.training.batch import to_batch
from megatron_dynmix.training.step import PassRunner

PROMPTS_AT_A_TIME = 32


@dataclass(frozen=True)
class Question:
    """A held-out conversation up to its last answer."""

    prompt: tuple[int, ...]
    """Token ids."""
    answer: str
    """What the pattern finds in the answer that was given."""


@dataclass(frozen=True, kw_only=True)
class AnswerReport:
    """What became of a source's held-out conversations; all four add up to their number."""

    correct: int
    wrong: int
    unchecked: int
    """Beyond the number asked for."""
    uncheckable: int
    """The answer given does not match the pattern, or the prompt leaves no room for one."""

    def to_json(self) -> dict[str, Any]:
        """The counts, and the share that is correct of what was checked (None if nothing was)."""
        checked = self.correct + self.wrong
        return {**asdict(self), "exact_match": self.correct / checked if checked else None}


def check_answers(
    run: PassRunner,
    prefix: Path,
    tokenizer: Tokenizer,
    pattern: str,
    *,
    max_answers: int,
    max_new_tokens: int,
    max_positions: int,
) -> AnswerReport:
    """Let the model answer held-out prompts, and compare with the answers given.

    Args:
        run: the model, on one rank.
        prefix: the prepared held-out conversations of a source.
        tokenizer: what they were prepared with.
        pattern: its one group is the answer; of several matches in a text the last one counts.
        max_answers: conversations to check, spread evenly over all that can be.
        max_new_tokens: where an answer that does not end is cut.
        max_positions: longest sequence the model is given.

    """
    conversations = list(_conversations(prefix))
    questions = [
        Question(tuple(prompt), answer)
        for prompt, given in conversations
        if len(prompt) + max_new_tokens <= max_positions
        and (answer := extract(pattern, tokenizer.decode(given))) is not None
    ]
    picked = [questions[i] for i in spread(len(questions), max_answers)]
    picked.sort(key=lambda question: len(question.prompt))  # prompts of one pass are filled up to the longest
    correct = 0
    for first in range(0, len(picked), PROMPTS_AT_A_TIME):
        asked = picked[first : first + PROMPTS_AT_A_TIME]
        texts = generate(run, [question.prompt for question in asked], tokenizer, max_new_tokens)
        correct += sum(
            extract(pattern, text) == question.answer for text, question in zip(texts, asked, strict=True)
        )
    return AnswerReport(
        correct=correct,
        wrong=len(picked) - correct,
        unchecked=len(questions) - len(picked),
        uncheckable=len(conversations) - len(questions),
    )


def extract(pattern: str, text: str) -> str | None:
    """The answer in a text: the group of the pattern's last match, without surrounding space."""
    found = [match for match in re.finditer(pattern, text) if match[1] is not None]
    return found[-1][1].strip() if found else None


def spread(available: int, wanted: int) -> list[int]:
    """`wanted` of the indices below `available`, evenly spaced; all of them if there are no more."""
    if available <= wanted:
        return list(range(available))
    return [i * available // wanted for i in range(wanted)]


def _conversations(prefix: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids before the last trained run of each document, and those of that run."""
    indexed = IndexedDataset(str(prefix), multimodal=True)
    bounds = indexed.document_indices
    for first, last in itertools.pairwise(bounds):
        runs = [indexed[int(sequence)] for sequence in range(first, last)]
        trained = [number for number, (_, mode) in enumerate(runs) if mode]
        if trained and trained[-1]:  # a conversation that begins with its only answer has no prompt
            prompt = np.concatenate([tokens for tokens, _ in runs[: trained[-1]]])
            yield prompt.tolist(), runs[trained[-1]][0].tolist()


@torch.no_grad()
def generate(
    run: PassRunner, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, max_new_tokens: int
) -> list[str]:
    """Continue each prompt with the likeliest tokens until the end of sequence, or `max_new_tokens`.

    Every token is a whole forward pass: fine for some hundred short answers of a small model.

    Args:
        run: the model, on one rank and in evaluation mode.
        prompts: token ids; filled up to the longest.
        tokenizer: knows the end of sequence.
        max_new_tokens: of each answer.

    Returns:
        The answers' texts, without the end of sequence.

    """
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    tokens_BS = torch.full((len(prompts), int(lengths_B.max()) + max_new_tokens), tokenizer.pad_id)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = torch.tensor(prompt)
    begin_B, done_B = lengths_B.clone(), torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        next_B = _next_tokens(run, tokens_BS[:, : int(lengths_B.max())], lengths_B, tokenizer.vocab_size)
        done_B |= next_B == tokenizer.eos_id
        if done_B.all():
            break
        going = ~done_B
        tokens_BS[going, lengths_B[going]] = next_B[going]
        lengths_B += going
    return [
        tokenizer.decode(tokens_S[begin:end].tolist())
        for tokens_S, begin, end in zip(tokens_BS, begin_B.tolist(), lengths_B.tolist(), strict=True)
    ]


def _next_tokens(
    run: PassRunner, tokens_BS: torch.Tensor, lengths_B: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """The likeliest token `[B]` behind each row's last one; never one that only fills the embedding up."""
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    padding_BS = positions_BS >= lengths_B[:, None]
    micro_batch = {
        "dataset_id": torch.zeros(len(tokens_BS), dtype=torch.int16),
        "half": torch.zeros(len(tokens_BS), dtype=torch.int8),
        "tokens": tokens_BS,
        "labels": torch.zeros_like(tokens_BS),
        "loss_mask": torch.zeros(tokens_BS.shape),
        "position_ids": positions_BS.masked_fill(padding_BS, 0),
        "segment_ids": torch.zeros_like(tokens_BS).masked_fill(padding_BS, -1),
        "padding_mask": padding_BS,
    }
    batch = to_batch(micro_batch, run.platform.device, join_rows=run.join_rows)
    logits_BSV = run.chunks[0](
        batch.tokens,
        batch.position_ids,
        batch.attention_mask,
        packed_seq_params=batch.packed_seq_params,
        padding_mask=batch.padding_mask,
    ).reshape(*tokens_BS.shape, -1)
    last_BV = logits_BSV[torch.arange(len(tokens_BS)), lengths_B.to(logits_BSV.device) - 1]
    return last_BV[:, :vocab_size].argmax(dim=-1).cpu()
