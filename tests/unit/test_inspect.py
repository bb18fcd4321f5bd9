import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_fixtures import (  # noqa: F401
    prepare,
    sharegpt,
    tokenizer_dir_fixture,
    tokenizer_fixture,
    varied_rows,
    write_jsonl,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dynmix.cli import main
from megatron_dynmix.commands.inspection import Inspection
from megatron_dynmix.config.load import to_yaml
from megatron_dynmix.data.packed import PackedSource
from megatron_dynmix.data.row_text import (
    Span,
    coloured,
    example_spans,
    example_text,
    excerpt,
    plain,
    printable,
    row_text,
    show,
)
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.sources import build_rows, plan_blend
from megatron_dynmix.data.tokenizer.base import Tokenizer

START_D = np.array([0.75, 0.25])
CONTROL = "a\x1b[31mred\x07 \u202eback\u2028\tend"


def packed(folder: Path, seq_length: int, **options: object) -> PackedRows:
    settings = {"seed": 7, "overlong": "truncate", "cache_dir": None} | options
    source = PackedSource(name="toy", prefix=folder / "source", seq_length=seq_length, **settings)
    return PackedRows(source, 2)


def test_an_example_with_marks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, [sharegpt("hello there", "good day", "two?", "four", system="be brief")], tokenizer)
    spans = example_text(IndexedDataset(str(tmp_path / "source"), multimodal=True), 0, tokenizer)
    head, text = plain(spans).rstrip("\n").split("\n")
    assert text == (
        "be brief USER: hello there ASSISTANT:[[ good day{{</s>}}]]USER: two? ASSISTANT:[[ four{{</s>}}]]"
    )
    trained = sum(len(tokenizer.encode_batch([part])[0][0]) for part in (" good day</s>", " four</s>"))
    assert head.startswith("example 0: ")
    assert head.endswith(f" tokens, {trained} trained")


def test_a_special_token_is_not_taken_for_a_text_that_looks_like_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    ids = [token for part in ("< /s>", "</s>") for token in tokenizer.encode_batch([part])[0][0]]
    spans = example_spans(np.array(ids), np.zeros(len(ids), dtype=bool), tokenizer)
    assert [(span.text, span.special) for span in spans] == [("< /s>", False), ("</s>", True)]


def test_characters_of_several_tokens_stay_whole(tokenizer: Tokenizer) -> None:
    ((ids, _),) = tokenizer.encode_batch(["für 東京 🙂 </s>ü"])
    trained = np.zeros(len(ids), dtype=bool)
    trained[-2:] = True
    assert "".join(span.text for span in example_spans(ids, trained, tokenizer)) == "für 東京 🙂 </s>ü"


def test_nothing_in_the_data_commands_the_terminal(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, [sharegpt(CONTROL, CONTROL)], tokenizer)
    spans = row_text(packed(tmp_path, 512), 0, tokenizer)
    for text in (plain(spans), coloured(spans).plain):
        assert all(char == "\n" or char.isprintable() for char in text)
        assert text.count(r"a\x1b[31mred\x07 \u202eback\u2028\tend") == 2
    assert printable("one\ntwo\r") == "one\ntwo\\r"


def test_every_token_of_a_row_is_shown(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, varied_rows(30), tokenizer)
    rows = packed(tmp_path, 300)
    assert sorted(number for row in range(len(rows)) for number in rows.examples_of(row)) == list(range(30))
    indexed = IndexedDataset(str(tmp_path / "source"), multimodal=True)
    row = max(range(len(rows)), key=lambda number: len(rows.examples_of(number)))
    shown = plain(row_text(rows, row, tokenizer))
    for number in rows.examples_of(row):
        assert "".join(plain(example_text(indexed, number, tokenizer)).split("\n", 1)[1]) in shown
    padding = int(rows[row]["padding_mask"].sum())
    assert shown.endswith(f"--- {padding} positions of padding\n")
    head = shown.split("\n")[0]
    trained = int(rows[row]["loss_mask"].sum())
    place = f"{len(rows.examples_of(row))} examples in {300 - padding} of 300 positions"
    assert head == f"row {row} of source toy: {place}, {trained} trained"


def test_a_truncated_example_is_said_to_be_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    length = prepare(tmp_path, [sharegpt("hi", "four " * 60)], tokenizer).max_length
    shown = plain(row_text(packed(tmp_path, 60), 0, tokenizer))
    assert f"--- example 0: 61 tokens, cut from {length}," in shown
    assert "1 example in 60 of 60 positions" in shown


def test_colours_on_a_terminal_and_marks_elsewhere(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path, [sharegpt("hello [bold]", "good day")], tokenizer)
    spans = row_text(packed(tmp_path, 64), 0, tokenizer)
    show(spans)
    assert capsys.readouterr().out == plain(spans)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    show(spans)
    coloured_text = capsys.readouterr().out
    assert "\x1b[32m good day" in coloured_text
    assert "hello [bold]" in coloured_text
    show(spans, in_colour=False)
    assert capsys.readouterr().out == plain(spans)


def test_a_terminal_of_another_encoding_shows_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    show([Span("東")], in_colour=False)
    assert raw.getvalue() == rb"\u6771"


def test_excerpt() -> None:
    assert excerpt("a\nb\n", 10) == "a\nb"
    assert excerpt("a\n" * 12, 10).split("\n")[-1] == "... 2 more lines"
    assert excerpt("one two\n\nthree", 2, width=4) == "one \ntwo\n... 3 more lines"


@pytest.fixture(name="run_yaml")
def run_yaml_fixture(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A prepared run of two sources."""
    for name, seed in (("code", 1), ("math", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", varied_rows(40, seed))
    content = {
        "data": {
            "tokenizer": str(tokenizer_dir),
            "template": "vicuna",
            "seq_length": 256,
            "sources": {
                "code": {"path": "code.jsonl", "weight": 0.75},
                "math": {"path": "math.jsonl", "weight": 0.25},
            },
        },
        "mixing": {"strategy": "fixed", "interval": 2},
        "training": {"train_iters": 8, "global_batch_size": 8},
    }
    path = tmp_path / "RUN.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["prepare", str(path)]) == 0
    return path


def inspect(*arguments: object) -> int:
    return main(["inspect", *map(str, arguments)])


def test_example_row_and_batch_of_a_run_that_is_to_begin(run_yaml: Path, capsys) -> None:
    capsys.readouterr()
    assert inspect(run_yaml, "--example", "code:3") == 0
    example = capsys.readouterr().out
    assert example.startswith("example 3: ")
    run = Inspection.of(run_yaml, [])
    rows = build_rows(run.config, run.tokenizer, probe=False)
    assert inspect(run_yaml, "--row", "code:1") == 0
    assert capsys.readouterr().out == plain(row_text(rows[0], 1, run.tokenizer))
    assert inspect(run_yaml, "--batch", "2") == 0
    batch = capsys.readouterr().out
    assert batch.startswith("iteration 2: samples 8 to 15; shares of rows: code 0.7500, math 0.2500\n")
    blend = plan_blend(run.config, rows, START_D)
    blend.advance_to(8)
    for sample, (dataset_id, row, *_) in enumerate(blend.draws(8, 16), start=8):
        name = ("code", "math")[dataset_id]
        assert f"=== sample {sample}: source {name}, epoch 0\nrow {row} of source {name}: " in batch
    assert batch.count("=== sample ") == 8


def test_flags_win_over_the_file(run_yaml: Path, capsys) -> None:
    assert inspect(run_yaml, "--row", "code:0", "--seq-length", "512") == 0
    assert " of 512 positions" in capsys.readouterr().out


def test_a_batch_of_a_later_epoch_is_what_the_blend_draws(run_yaml: Path, capsys) -> None:
    run = Inspection.of(run_yaml, [])
    rows = build_rows(run.config, run.tokenizer, probe=False)
    drawn = plan_blend(run.config, rows, START_D).draws(0, 80)
    epoch = [
        sum(other == drawn[i][0] for other, *_ in drawn[:i]) // len(rows[drawn[i][0]]) for i in range(80)
    ]
    assert max(epoch) > 0
    for iteration in (1, 5, 10):
        capsys.readouterr()
        assert inspect(run_yaml, "--batch", iteration) == 0
        shown = capsys.readouterr().out
        for sample in range(8 * iteration - 8, 8 * iteration):
            dataset_id, row, _ = drawn[sample]
            name = ("code", "math")[dataset_id]
            assert (
                f"=== sample {sample}: source {name}, epoch {epoch[sample]}\nrow {row} of source {name}: "
                in shown
            )


@pytest.fixture(name="run_dir")
def run_dir_fixture(run_yaml: Path) -> Path:
    """The directory of that run."""
    folder = run_yaml.parent / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(Inspection.of(run_yaml, []).config))
    return folder


def test_examples_and_rows_of_a_run_directory_are_those_of_its_settings(
    run_yaml: Path, run_dir: Path, capsys
) -> None:
    for what in (("--example", "code:3"), ("--row", "math:1")):
        shown = []
        for target in (run_yaml, run_dir):
            capsys.readouterr()
            assert inspect(target, *what) == 0
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1] != ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch", "7"], "whose weights may have changed; give a RUN.yaml"),
        (["--row", "code:9999"], "there is no row 9999 of source code"),
        (["--row", "cod:1"], "there are code, math"),
        (["--row", "3"], "it must be SOURCE:N"),
        (["--row", "code:-1"], "whole number"),
        (["--example", "math:40"], "it has 40 examples; give 0 to 39"),
        (["--row", "code:1", "--seq-length", "64"], "leave the flags out"),
    ],
)
def test_what_a_run_does_not_have(run_dir: Path, arguments: list[str], named: str, capsys) -> None:
    assert inspect(run_dir, *arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_there_is_no_iteration_zero(run_yaml: Path, capsys) -> None:
    assert inspect(run_yaml, "--batch", 0) == 2
    assert "the first one is 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_iters", "global_batch_size"])
def test_a_batch_needs_a_run_with_a_length(run_yaml: Path, name: str, capsys) -> None:
    content = yaml.safe_load(run_yaml.read_text())
    del content["training"][name]
    run_yaml.write_text(yaml.safe_dump(content))
    assert inspect(run_yaml, "--batch", 1) == 2
    assert f"training.{name}" in capsys.readouterr().err


def test_prefix(tmp_path: Path, tokenizer: Tokenizer, tokenizer_dir: Path, capsys) -> None:
    prepare(tmp_path, varied_rows(5), tokenizer)
    prefix = tmp_path / "source"
    assert inspect(prefix, "--example", 4, "--tokenizer", tokenizer_dir) == 0
    assert capsys.readouterr().out.startswith("example 4: ")
    for arguments, named in (
        ((prefix, "--example", 5, "--tokenizer", tokenizer_dir), "it has 5 examples; give 0 to 4"),
        ((prefix, "--example", 4), "--tokenizer DIR"),
        ((prefix, "--row", "code:4", "--tokenizer", tokenizer_dir), "taken for the prefix"),
        ((tmp_path / "nothing", "--example", 1, "--tokenizer", tokenizer_dir), "not a prepared source"),
        ((tmp_path, "--example", "code:1"), "no run directory"),
    ):
        assert inspect(*arguments) == 2
        assert named in capsys.readouterr().err


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer, run_yaml: Path, capsys) -> None:
    from megatron_dynmix.data.tokenizer.fast import train_bpe

    prepare(tmp_path, varied_rows(5), tokenizer)
    train_bpe(["something else"] * 9, 300, tmp_path / "other")
    assert inspect(tmp_path / "source", "--example", 1, "--tokenizer", tmp_path / "other") == 2
    assert "prepared with another tokenizer" in capsys.readouterr().err
    assert inspect(run_yaml, "--row", "code:1", "--tokenizer", tmp_path / "other") == 2
    assert "was prepared with another tokenizer" in capsys.readouterr().err


def test_rows_that_changed_since_are_not_shown(run_yaml: Path, capsys) -> None:
    write_jsonl(run_yaml.parent / "math.jsonl", varied_rows(40, 5))
    assert inspect(run_yaml, "--row", "code:1") == 2
    assert "math.jsonl was changed since it was prepared" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_it_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as pipe:
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", pipe)
        show([Span("text\n" * 30_000)])
