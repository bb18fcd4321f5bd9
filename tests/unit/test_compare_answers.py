"""Answers that can be checked: which are asked for, how they are generated, what counts as right."""

import re
from types import SimpleNamespace

import pytest
import torch

from megatron_dynmix import platform

platform.start()

from megatron_dynmix.config.run_config import SourceConfig  # noqa: E402
from megatron_dynmix.errors import InputError  # noqa: E402
from megatron_dynmix.training import answers  # noqa: E402

VOCAB, EOS, PAD = 10, 9, 0


class CountingTokenizer:
    """Tokens are digits."""

    vocab_size, eos_id, pad_id = VOCAB, EOS, PAD

    def decode(self, ids):
        return "".join(map(str, ids))


class CountingModel:
    """Says that the next token is the one after the last; padding of the vocabulary would be likelier."""

    def __init__(self):
        self.lengths = []

    def __call__(self, tokens, positions, mask, *, packed_seq_params, padding_mask):
        self.lengths.append(tokens.shape[1])
        assert not positions.masked_select(padding_mask).any()
        logits = torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB + 6).float()
        logits[..., VOCAB:] = 5.0
        return logits


@pytest.fixture
def run(monkeypatch):
    def as_it_is(micro_batch, device, *, join_rows):
        return SimpleNamespace(
            tokens=micro_batch["tokens"],
            position_ids=micro_batch["position_ids"],
            attention_mask=None,
            packed_seq_params=None,
            padding_mask=micro_batch["padding_mask"],
        )

    monkeypatch.setattr(answers, "to_batch", as_it_is)
    here = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(chunks=[CountingModel()], platform=here, join_rows=False)


def test_prompts_of_different_lengths_are_continued_until_they_end(run):
    texts = answers.generate(run, [[1, 2, 3], [6], [4, 5]], CountingTokenizer(), 4)
    assert texts == ["4567", "78", "6789"[:3]]


def test_generation_stops_when_all_have_ended(run):
    assert answers.generate(run, [[1, 7], [8]], CountingTokenizer(), 100) == ["8", ""]
    assert run.chunks[0].lengths == [2, 3]


def test_the_last_match_is_the_answer():
    pattern = r"(?:####|The answer is) *\(?([^\s).]+)"
    assert answers.extract(pattern, "6 #### 5 no\n#### 12 ") == "12"
    assert answers.extract(pattern, "So it is 7.\nThe answer is (B).") == "B"
    assert answers.extract(pattern, "no idea") is None
    assert answers.extract(r"=( *\d+ *)$", "x = 4 ") == "4"
    assert answers.extract(r"a(b)?", "ab a") == "b"  # a match without the group holds no answer


def test_what_is_asked_is_spread_evenly():
    assert answers.spread(3, 5) == [0, 1, 2]
    assert answers.spread(10, 3) == [0, 3, 6]
    picked = answers.spread(1000, 7)
    assert len(set(picked)) == 7 and max(picked) < 1000


def test_every_conversation_is_accounted_for(run, monkeypatch):
    conversations = [
        *([([1, 2], [3, 4]), ([5], [6, 7])] * 3),  # prompts and given answers
        *(([1] * 50, [2, 3]), ([2], [])),  # no room, no answer
    ]
    monkeypatch.setattr(answers, "_conversations", lambda prefix: iter(conversations))
    report = answers.check_answers(
        *(run, None, CountingTokenizer(), r"^(\d\d)"), max_answers=4, max_new_tokens=3, max_positions=20
    )
    assert report.to_json() == {
        **{"correct": 4, "wrong": 0, "unchecked": 2, "uncheckable": 2, "exact_match": 1.0}
    }
    nothing = answers.check_answers(
        *(run, None, CountingTokenizer(), "(x)"), max_answers=4, max_new_tokens=3, max_positions=20
    )
    assert nothing.to_json()["exact_match"] is None and nothing.uncheckable == len(conversations)


@pytest.mark.parametrize("pattern", ["no group", "(two) (groups)", "(open"])
def test_a_pattern_needs_one_group(pattern):
    with pytest.raises(InputError, match=re.escape(repr(pattern))):
        SourceConfig(path="a", answer=pattern)
