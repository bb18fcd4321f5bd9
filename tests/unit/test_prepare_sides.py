"""What `prepare` does beside encoding: duplicates, held-out examples, splitting, strictness, skipping."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import (  # noqa: F401
    prepare,
    prepare_files,
    sharegpt,
    tokenizer_dir_fixture,
    tokenizer_fixture,
    varied_rows,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_dynmix.data.prepare import inputs
from megatron_dynmix.data.prepare import prepare as prepare_module
from megatron_dynmix.data.prepare.conversation import Conversation, Turn
from megatron_dynmix.data.prepare.encode import split_conversation
from megatron_dynmix.data.prepare.examples import Examples, HeldOut, join, pack_examples
from megatron_dynmix.data.prepare.index_writer import IndexedWriter
from megatron_dynmix.data.prepared import (
    DIGEST,
    Shared,
    count_duplicates,
    load_report,
    probe_prefix,
    read_digests,
    shared_texts,
)
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.errors import CommandFailed, InputError


def digests_of(texts: list[str]) -> np.ndarray:
    raw = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(raw, dtype=DIGEST)


def examples_of(texts: list[str]) -> Examples:
    """One example for each text; its tokens are the characters, of which vowels are trained on."""
    ids = [np.array([ord(char) for char in text]) for text in texts]
    trained = [np.array([char in "aeiou" for char in text]) for text in texts]
    return pack_examples(ids, trained, [digest.tobytes() for digest in digests_of(texts)], np.int32)


def texts_of(examples: Examples) -> list[str]:
    borders = np.cumsum(examples.sizes_N)[:-1]
    return ["".join(map(chr, ids)) for ids in np.split(examples.tokens_T, borders)] if len(examples) else []


WORDS = st.lists(st.text("abcdeiz", min_size=1, max_size=6), min_size=1, max_size=30)


@given(WORDS)
def test_flat_examples_hold_what_was_packed(words: list[str]) -> None:
    examples = examples_of(words)
    assert texts_of(examples) == words
    assert examples.lengths_Q.sum() == sum(map(len, words)) and (examples.lengths_Q > 0).all()
    modes = np.repeat(examples.modes_Q, examples.lengths_Q)
    assert modes.tolist() == [int(char in "aeiou") for word in words for char in word]
    inside = np.ones(len(examples.modes_Q), dtype=bool)
    inside[np.cumsum(examples.sequences_N) - examples.sequences_N] = False
    assert (np.diff(examples.modes_Q)[inside[1:]] != 0).all(), "neighbours in an example are one run"
    kept = np.array([len(word) > 2 for word in words])
    assert texts_of(examples.select(kept)) == [word for word in words if len(word) > 2]
    assert texts_of(join([examples, examples])) == words * 2


@settings(max_examples=20)
@given(st.lists(WORDS, min_size=1, max_size=4))
def test_index_is_that_of_megatron_core(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("index")
    builder = IndexedDatasetBuilder(str(folder / "peer.bin"), dtype=np.int32, multimodal=True)
    with IndexedWriter(folder / "ours", np.int32) as writer:
        for words in parts:
            examples = examples_of(words)
            writer.add(examples)
            for word in words:
                one = examples_of([word])
                builder.add_document(one.tokens_T, one.lengths_Q.tolist(), one.modes_Q.tolist())
        writer.finish()
    builder.finalize(str(folder / "peer.idx"))
    for suffix in ("bin", "idx"):
        assert (folder / f"ours.{suffix}").read_bytes() == (folder / f"peer.{suffix}").read_bytes()
    assert {path.name for path in folder.iterdir()} == {
        *("ours.bin", "ours.idx", "ours.digests"),
        *("peer.bin", "peer.idx"),
    }


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=8), min_size=1, max_size=4))
def test_duplicates_are_counted_as_sets_would(sources: list[list[str]]) -> None:
    digests = [digests_of(texts) for texts in sources]
    for texts, one in zip(sources, digests, strict=True):
        assert count_duplicates(one) == len(texts) - len(set(texts))
    expected = [
        Shared(first=i, second=j, texts=len(set(sources[i]) & set(sources[j])))
        for i in range(len(sources))
        for j in range(i + 1, len(sources))
        if set(sources[i]) & set(sources[j])
    ]
    assert shared_texts(digests) == expected


@given(WORDS, st.integers(1, 8), st.integers(1, 5))
def test_held_out_texts_are_those_with_the_smallest_digests(words: list[str], count: int, size: int) -> None:
    sieve = HeldOut(count)
    trained = []
    for start in range(0, len(words), size):
        trained += texts_of(sieve.sift(examples_of(words[start : start + size])))
    by_digest = sorted(set(words), key=lambda word: digests_of([word]).tobytes())
    held_out = texts_of(sieve.all())
    assert set(held_out) == set(by_digest[:count]) and len(sieve) == min(count, len(by_digest))
    assert sorted(trained + held_out) == sorted(words)
    assert not set(trained) & set(held_out)


def test_probe_is_held_out_and_nothing_is_lost(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = varied_rows(40)
    rows += rows[:10]
    whole = prepare(tmp_path, rows, tokenizer, prefix=tmp_path / "whole")
    report = prepare(tmp_path, rows, tokenizer, held_out=7)
    probe = load_report(probe_prefix(tmp_path / "source"))
    assert (probe.probe_of, probe.name) == ("toy", "toy (probe)")
    assert report.held_out == probe.examples == 7 + probe.duplicates
    assert report.examples + report.held_out == report.rows == whole.examples == 50
    assert report.tokens + probe.tokens == whole.tokens
    digests = [read_digests(tmp_path / f"{name}.digests") for name in ("whole", "source", "source.probe")]
    assert sorted(digests[0].tolist()) == sorted([*digests[1].tolist(), *digests[2].tolist()])
    assert shared_texts(digests[1:]) == []
    assert report.duplicates + probe.duplicates == 10


def test_probe_is_stable_when_rows_are_appended(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = varied_rows(60)
    prepare(tmp_path, rows[:50], tokenizer, held_out=20)
    before = set(read_digests(tmp_path / "source.probe.digests").tolist())
    prepare(tmp_path, [*rows[50:], *rows[:50][::-1]], tokenizer, held_out=20)
    after = set(read_digests(tmp_path / "source.probe.digests").tolist())
    assert len(before & after) >= 14


def test_probe_that_is_not_held_out_any_more_goes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = varied_rows(10)
    prepare(tmp_path, rows, tokenizer, held_out=3)
    assert prepare(tmp_path, rows, tokenizer).examples == 10
    assert not list(tmp_path.glob("source.probe.*"))


def test_probe_larger_than_the_source_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"4 different examples were to be held out.*has only 3 and 0 more"):
        prepare(tmp_path, varied_rows(3) * 2, tokenizer, held_out=4)
    with pytest.raises(InputError, match=r"3 different examples"):
        prepare(tmp_path, varied_rows(3), tokenizer, held_out=3)
    assert not list(tmp_path.glob("source*"))


TURNS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(TURNS, st.integers(1, 20), st.booleans())
def test_split_keeps_every_turn_and_fills_the_parts(lengths: list[int], limit: int, has_system: bool) -> None:
    system = (Turn("system", "s"),) if has_system else ()
    rounds = [(Turn("user", "u" * n), Turn("assistant", str(at))) for at, n in enumerate(lengths)]
    conversation = Conversation((*system, *(turn for one in rounds for turn in one)))

    def length(part: Conversation) -> int:
        return sum(len(turn.text) for turn in part.turns if turn.role == "user") + len(system)

    parts = split_conversation(conversation, limit, length)
    assert (
        tuple(t for part in parts for t in part.turns if t.role != "system")
        == conversation.turns[len(system) :]
    )
    for part in parts:
        assert part.turns[: len(system)] == system and part.turns[len(system)].role == "user"
        assert length(part) <= limit or len(part.turns) == len(system) + 2
    for part, following in pairwise(parts):
        more = Conversation((*part.turns, *following.turns[len(system) : len(system) + 2]))
        assert length(more) > limit, "another round would have fitted"


def test_overlong_conversations_are_split_at_turns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [text for n in range(12) for text in (f"question {n}", f"answer {n}")]
    rows = [sharegpt(*texts, system="be brief"), sharegpt("hello", "good day"), sharegpt("a " * 90, "b")]
    whole = prepare(tmp_path, rows, tokenizer)
    limit = whole.max_length // 3
    report = prepare(tmp_path, rows, tokenizer, split_length=limit)
    assert (report.split, report.rows, report.untrained, report.broken) == (1, 3, 0, 0)
    assert report.rows - report.split + report.split_parts == report.examples
    indexed = IndexedDataset(str(tmp_path / "source"), multimodal=True)
    borders = indexed.document_indices
    found = []
    for first, last in pairwise(borders):
        sequences, modes = indexed[first:last]
        assert modes.any()
        found.append(tokenizer.decode([token for ids in sequences for token in ids.tolist()]))
    parts = found[: report.split_parts]
    assert all(part.startswith("be brief USER: question ") for part in parts)
    assert [text in "".join(parts) for text in texts] == [True] * 24
    sizes = np.add.reduceat(indexed.sequence_lengths, borders[:-1])
    assert sizes[: report.split_parts].max() <= limit + 1
    assert report.split_parts >= 3


def test_I12_strict_refuses_the_first_bad_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [sharegpt("a", "b"), '{"conversations": ', "{}"]
    where = f"{tmp_path / 'rows.jsonl'}:2: not JSON"
    with pytest.raises(InputError, match=where) as refusal:
        prepare(tmp_path, rows, tokenizer, strict=True)
    assert "leave out strict" in str(refusal.value)
    assert not list(tmp_path.glob("source*"))
    prepare(tmp_path, rows, tokenizer)
    with pytest.raises(InputError, match=where):
        prepare(tmp_path, rows, tokenizer, strict=True)
    assert prepare(tmp_path, rows[:1], tokenizer, strict=True).examples == 1


def test_unchanged_source_is_skipped_and_a_changed_one_is_not(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prefix = write_jsonl(tmp_path / "rows.jsonl", varied_rows(5)), tmp_path / "source"

    def again(**options: object) -> bool:
        """Whether it was prepared again."""
        before = prefix.with_name("source.bin").stat().st_ino
        settings = {"name": "toy", "inputs": [path], "prefix": prefix, "tokenizer": tokenizer}
        prepare_files(**settings | options)
        return prefix.with_name("source.bin").stat().st_ino != before

    prefix.with_name("source.bin").touch()
    assert again()
    with monkeypatch.context() as patch:
        patch.setattr(inputs.hashlib, "sha256", None)  # the bytes are not read again
        patch.setattr(prepare_module.Renderer, "fingerprint", "vicuna")
        assert not again()
    print_before = load_report(prefix).fingerprint
    copy = tmp_path / "moved.jsonl"
    copy.write_bytes(path.read_bytes())
    assert not again(inputs=[copy])
    assert load_report(prefix).inputs[0].path == str(copy)
    assert load_report(prefix).fingerprint == print_before
    assert again(template="plain")
    assert again(held_out=2)
    assert not again(held_out=2)
    probe_prefix(prefix).with_name("source.probe.bin").unlink()
    assert again(held_out=2)
    assert again(split_length=10)
    assert again(inputs=[path, path])
    write_jsonl(path, varied_rows(5, seed=1))
    assert again()


def test_input_that_changes_meanwhile_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = prepare_module.IndexedWriter.finish

    def grow(writer: IndexedWriter) -> None:
        finish(writer)
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write("{}\n")

    monkeypatch.setattr(prepare_module.IndexedWriter, "finish", grow)
    with pytest.raises(InputError, match=r"rows.jsonl: was changed while it was read"):
        prepare(tmp_path, varied_rows(2), tokenizer)
    assert not list(tmp_path.glob("source*"))


@pytest.mark.parametrize("full", ["add", "finish"])
def test_full_disk_is_one_message_and_leaves_what_was_there(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    before = prepare(tmp_path, varied_rows(2), tokenizer)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module.IndexedWriter, full, fail)
    with pytest.raises(CommandFailed, match=r"source toy: no space is left for .*source.*free some space"):
        prepare(tmp_path, varied_rows(3), tokenizer)
    assert load_report(tmp_path / "source") == before
    assert not list(tmp_path.glob(".source.draft"))


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, tokenizer: Tokenizer) -> None:
    left = tmp_path / ".source.draft"
    left.mkdir()
    (left / "source.bin").write_text("half of it")
    assert prepare(tmp_path, varied_rows(3), tokenizer).examples == 3
    assert not left.exists()


@pytest.mark.parametrize("place", ["rows.jsonl/source", "folder", "n" * 300])
def test_place_that_is_none_is_named(tmp_path: Path, tokenizer: Tokenizer, place: str) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"source toy: .* cannot be written \(.*\); give another place"):
        prepare(tmp_path, varied_rows(2), tokenizer, prefix=tmp_path / place)


def test_rows_nested_too_deeply_are_bad_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    talk = '"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    rows = [
        f'{{{talk}, "tools": [{{"x": {"[" * depth}{"]" * depth}}}]}}' for depth in (850, 900, 950, 100_000)
    ]
    report = prepare(tmp_path, [f"{{{talk}}}", *rows], tokenizer, workers=1)
    assert (report.examples, report.broken) == (1, 4)
    assert "nested too deeply" in report.first_broken[-1]  # Python 3.12 and later read the others


def test_place_that_cannot_be_written_is_named(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"source toy: .*source cannot be written \(Permission denied\)"):
        prepare(tmp_path, varied_rows(2), tokenizer)
