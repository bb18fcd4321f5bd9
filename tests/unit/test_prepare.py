import dataclasses
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import (  # noqa: F401
    prepare,
    sharegpt,
    tokenizer_dir_fixture,
    tokenizer_fixture,
    varied_rows,
    write_jsonl,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer

from megatron_dynmix.data import prepare as prepare_module
from megatron_dynmix.data.conversation import parse_sharegpt
from megatron_dynmix.data.prepare import is_current, load_report
from megatron_dynmix.data.template import render, token_mask
from megatron_dynmix.data.tokenizer import Tokenizer
from megatron_dynmix.errors import InputError

ROWS = [
    sharegpt("hello there", "good day"),
    '{"conversations": ',
    sharegpt("a", "b", "c"),
    sharegpt("hello there", "good day", id="again"),
    sharegpt("two plus two", "four", "what is two", "two", system="be brief"),
]


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def documents(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids and trained flags of every document."""
    indexed = IndexedDataset(str(prefix), multimodal=True)
    borders = indexed.document_indices.tolist()
    found = []
    for first, last in pairwise(borders):
        sequences, modes = indexed[first:last]
        ids = [token for sequence in sequences for token in sequence.tolist()]
        trained = np.repeat(modes, [len(sequence) for sequence in sequences])
        assert (np.diff(modes) != 0).all()
        found.append((ids, trained.tolist()))
    return found


@pytest.mark.parametrize("template", ["vicuna", "tokenizer"])
def test_documents_are_the_rendered_conversations(
    tmp_path: Path, tokenizer: Tokenizer, template: str
) -> None:
    rows = varied_rows(30)
    report = prepare(tmp_path, rows, tokenizer, template=template)
    found = documents(tmp_path / "source")
    assert len(found) == report.examples == len(rows)
    for row, (ids, trained) in zip(rows, found, strict=True):
        rendered = render(parse_sharegpt(row), tokenizer, template)
        ((expected, starts),) = tokenizer.encode_batch([rendered.text])
        assert ids == expected.tolist()
        assert trained == token_mask(starts, rendered.trained_spans).astype(int).tolist()
        assert tokenizer.decode(ids) == rendered.text


def test_I12_every_row_is_accounted_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = prepare(tmp_path, ROWS, tokenizer)
    assert (report.examples, report.broken, report.untrained, report.duplicates) == (3, 2, 0, 1)
    assert report.examples + report.broken + report.untrained == len(ROWS)
    path = tmp_path / "rows.jsonl"
    assert report.first_broken[0].startswith(f"{path}:2: not JSON")
    assert report.first_broken[1] == f"{path}:3: ends with a user turn that has no answer"
    found = documents(tmp_path / "source")
    assert report.tokens == sum(len(ids) for ids, _ in found)
    assert report.trained_tokens == sum(sum(trained) for _, trained in found)
    assert report.max_length == max(len(ids) for ids, _ in found)


def test_I12_only_the_first_five_broken_lines_are_shown_and_all_counted(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    report = prepare(tmp_path, ["{}"] * 9 + ROWS[:1], tokenizer)
    assert report.broken == 9
    assert [place.split(":")[-2] for place in report.first_broken] == ["1", "2", "3", "4", "5"]


def test_I12_untrained_examples_are_dropped_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_second(*args: object) -> object:
        rendered = render(*args)
        return dataclasses.replace(rendered, trained_spans=()) if "two plus" in rendered.text else rendered

    monkeypatch.setattr(prepare_module, "render", without_second)
    report = prepare(tmp_path, ROWS, tokenizer)
    assert (report.examples, report.untrained, report.broken) == (2, 1, 2)
    assert len(documents(tmp_path / "source")) == 2


def test_I12_a_source_without_an_example_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"none of 1 rows can be trained on .*rows.jsonl:1"):
        prepare(tmp_path, ["{}"], tokenizer)
    assert files_of(tmp_path) == {"rows.jsonl"}


def test_report_and_inputs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = write_jsonl(tmp_path / "more.jsonl", ROWS[:1])
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    prefix = tmp_path / "deep" / "my.source"
    report = prepare(tmp_path, ROWS, tokenizer, inputs=[path, other], prefix=prefix, name="chat")
    assert load_report(prefix) == report
    assert files_of(prefix.parent) == {"my.source.bin", "my.source.idx", "my.source.json"}
    assert report.name == "chat"
    assert report.duplicates == 2
    assert [(file.path, file.size) for file in report.inputs] == [
        (str(path), path.stat().st_size),
        (str(other), other.stat().st_size),
    ]
    assert report.fingerprint == load_report(prefix).fingerprint
    with pytest.raises(InputError, match="no input files"):
        prepare(tmp_path, ROWS, tokenizer, inputs=[])
    with pytest.raises(InputError, match="cannot be read"):
        prepare(tmp_path, ROWS, tokenizer, inputs=[tmp_path / "missing.jsonl"])


def test_many_batches_keep_the_order(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = varied_rows(20)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    prepare(tmp_path / "a", rows, tokenizer)
    monkeypatch.setattr(prepare_module, "_BATCH", 3)
    prepare(tmp_path / "b", rows, tokenizer)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"a/source.{suffix}").read_bytes() == (
            tmp_path / f"b/source.{suffix}"
        ).read_bytes()


def test_is_current(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    prefix, path = tmp_path / "source", tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    assert not is_current(prefix, [path], tokenizer, "vicuna")
    prepare(tmp_path, ROWS, tokenizer)
    assert is_current(prefix, [path], tokenizer, "vicuna")
    assert is_current(prefix, [shutil.copy(path, tmp_path / "moved.jsonl")], tokenizer, "vicuna")
    assert not is_current(prefix, [path], tokenizer, "tokenizer")
    assert not is_current(prefix, [path, path], tokenizer, "vicuna")
    changed = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    changed.add_tokens(["<new>"])
    assert not is_current(prefix, [path], Tokenizer(changed), "vicuna")
    write_jsonl(path, ROWS[:1])
    assert not is_current(prefix, [path], tokenizer, "vicuna")
    with pytest.raises(InputError, match="cannot be read"):
        is_current(prefix, [tmp_path / "missing.jsonl"], tokenizer, "vicuna")


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_missing_file(tmp_path: Path, tokenizer: Tokenizer, suffix: str) -> None:
    prepare(tmp_path, ROWS, tokenizer)
    (tmp_path / f"source.{suffix}").unlink()
    with pytest.raises(InputError, match=r"not a prepared source.*megatron-dynmix prepare"):
        load_report(tmp_path / "source")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"inputs": [3]}', '{"inputs": [], "first_broken": []}']
)
def test_damaged_report(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    prepare(tmp_path, ROWS, tokenizer)
    (tmp_path / "source.json").write_text(content)
    with pytest.raises(InputError, match="not a report of a prepared source"):
        load_report(tmp_path / "source")


def test_other_version_and_cut_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, ROWS, tokenizer)
    path = tmp_path / "source.json"
    original = path.read_text()
    path.write_text(json.dumps({**json.loads(original), "version": 0}))
    with pytest.raises(InputError, match="format 0"):
        load_report(tmp_path / "source")
    path.write_text(original)
    os.truncate(tmp_path / "source.bin", 10)
    with pytest.raises(InputError, match="have 10 and"):
        load_report(tmp_path / "source")


def test_a_stop_half_way_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IndexedDatasetBuilder, "finalize", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, ROWS, tokenizer)
    assert files_of(tmp_path) == {"rows.jsonl"}


def test_a_stop_while_replacing_leaves_no_report(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, ROWS, tokenizer)
    moved = []

    def replace_one(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(shutil.move(source, target))

    monkeypatch.setattr(os, "replace", replace_one)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, ROWS[:1], tokenizer)
    assert files_of(tmp_path) == {"rows.jsonl", "source.bin", "source.idx"}
    with pytest.raises(InputError, match="not a prepared source"):
        load_report(tmp_path / "source")


def test_template_that_refuses_names_file_and_line(tmp_path: Path, tokenizer_dir: Path) -> None:
    hf_tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    hf_tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match=r"rows.jsonl:1: .*use the template vicuna"):
        prepare(tmp_path, ROWS, Tokenizer(hf_tokenizer), template="tokenizer")
