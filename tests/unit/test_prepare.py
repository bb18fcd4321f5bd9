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
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from megatron_dynmix.data.prepare import encode as encode_module
from megatron_dynmix.data.prepare import prepare as prepare_module
from megatron_dynmix.data.prepare.conversation import Conversation
from megatron_dynmix.data.prepare.formats import parse_sharegpt
from megatron_dynmix.data.prepare.template import Rendered, Renderer, token_mask
from megatron_dynmix.data.prepared import load_report
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.fast import FastTokenizer
from megatron_dynmix.data.tokenizer.folder import of_transformers
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
        rendered = Renderer(tokenizer, template).render(parse_sharegpt(row))
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
    original = Renderer.render

    def without_second(renderer: Renderer, conversation: Conversation) -> Rendered:
        rendered = original(renderer, conversation)
        return dataclasses.replace(rendered, trained_spans=()) if "two plus" in rendered.text else rendered

    monkeypatch.setattr(encode_module.Renderer, "render", without_second)
    report = prepare(tmp_path, ROWS, tokenizer)
    assert (report.examples, report.untrained, report.broken) == (2, 1, 2)
    assert f"{tmp_path / 'rows.jsonl'}:5: no token to train on" in report.first_broken
    assert len(documents(tmp_path / "source")) == 2


def test_I12_a_source_without_an_example_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"none of 1 rows can be trained on .*rows.jsonl:1"):
        prepare(tmp_path, [sharegpt("no answer")], tokenizer)
    assert files_of(tmp_path) == {"rows.jsonl"}


def test_report_and_inputs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = write_jsonl(tmp_path / "more.jsonl", ROWS[:1])
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    prefix = tmp_path / "deep" / "my.source"
    report = prepare(tmp_path, ROWS, tokenizer, inputs=[path, other], prefix=prefix, name="chat")
    assert load_report(prefix) == report
    assert files_of(prefix.parent) == {f"my.source.{suffix}" for suffix in ("bin", "idx", "digests", "json")}
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


@pytest.mark.parametrize("suffix", ["bin", "idx", "digests", "json"])
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
    with pytest.raises(InputError, match="have 10, "):
        load_report(tmp_path / "source")


def test_a_stop_half_way_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module.IndexedWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, ROWS, tokenizer)
    assert files_of(tmp_path) == {"rows.jsonl"}


def test_a_stop_half_way_leaves_the_old_result(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare(tmp_path, ROWS, tokenizer)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("source.*")}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "refuse_changed", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, ROWS[:1], tokenizer)
    assert load_report(tmp_path / "source") == before
    assert {path.name: path.read_bytes() for path in tmp_path.glob("source.*")} == files
    assert prepare(tmp_path, ROWS[:1], tokenizer).examples == 1


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
    assert files_of(tmp_path) >= {"rows.jsonl", "source.bin"}
    with pytest.raises(InputError, match="not a prepared source"):
        load_report(tmp_path / "source")


def test_template_that_refuses_names_file_and_line(tmp_path: Path, tokenizer_dir: Path) -> None:
    hf_tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    hf_tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match=r"none of 5 rows .*rows.jsonl:1: .* refuses the conversation .no."):
        prepare(tmp_path, ROWS, FastTokenizer(of_transformers(hf_tokenizer)), template="tokenizer")


REASONED = {
    "messages": [
        {"role": "user", "content": "two plus two"},
        {"role": "assistant", "content": "four", "reasoning_content": "two and two"},
        {"role": "user", "content": "plus one"},
        {"role": "assistant", "content": "five", "reasoning_content": "four and one"},
    ]
}
LAST_REASONS = (
    "{% for m in messages %}{{ m.role }}:{% if loop.last and not KEEPS and m.reasoning_content %}"
    "{{ m.reasoning_content }}|{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt }}"
)


def test_each_round_is_an_example_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (path := tmp_path / "t.jinja").write_text(LAST_REASONS.replace("not KEEPS", "true"))
    both = prepare(tmp_path, [REASONED], tokenizer, template=str(path))
    assert (both.examples, [one.kind for one in both.notices]) == (1, ["removed reasoning"])
    rounds = prepare(tmp_path, [REASONED], tokenizer, template=str(path), train_on="rounds")
    assert (rounds.examples, rounds.broken, rounds.untrained, rounds.notices) == (2, 0, 0, ())
    assert rounds.trained_tokens > both.trained_tokens
    # too long a history goes, and what is left of it is nobody's example again
    short = prepare(tmp_path, [REASONED], tokenizer, template=str(path), train_on="rounds", split_length=30)
    assert (short.examples, short.broken, short.untrained) == (2, 0, 0)
    assert short.trained_tokens == rounds.trained_tokens


def test_a_row_whose_parts_a_template_refuses_is_a_bad_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (path := tmp_path / "t.jinja").write_text(LAST_REASONS.replace("not KEEPS", "messages | length == 4"))
    rows = [REASONED, {"messages": [*REASONED["messages"][:1], {"role": "assistant", "content": "four"}]}]
    report = prepare(tmp_path, rows, tokenizer, template=str(path), split_length=30)
    assert (report.examples, report.broken) == (1, 1)
    assert (
        "rows.jsonl:1: split at rounds: the chat template leaves out the reasoning" in report.first_broken[0]
    )
