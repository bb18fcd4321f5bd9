import pickle
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import (  # noqa: F401
    prepare,
    sharegpt,
    tokenizer_dir_fixture,
    tokenizer_fixture,
    varied_rows,
)
from torch.utils.data import DataLoader

from megatron_dynmix.data.packed import PackedSource
from megatron_dynmix.data.prepare.formats import parse_sharegpt
from megatron_dynmix.data.prepare.template import Renderer, token_mask
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.errors import InputError

PAD = 2


def build(folder: Path, seq_length: int, **options: object) -> PackedRows:
    settings = {"seed": 7, "overlong": "drop", "cache_dir": None} | options
    source = PackedSource(name="toy", prefix=folder / "source", seq_length=seq_length, **settings)
    return PackedRows(source, PAD)


def examples_of(rows: list[dict], tokenizer: Tokenizer, seq_length: int) -> set[tuple]:
    """(tokens, labels, loss mask) of each row's example, straight from the conversation."""
    found = set()
    for row in rows:
        rendered = Renderer(tokenizer, "vicuna").render(parse_sharegpt(row))
        ((ids, starts),) = tokenizer.encode_batch([rendered.text])
        trained = token_mask(starts, rendered.trained_spans)
        cut = slice(1, seq_length + 1)
        found.add((tuple(ids[:-1][:seq_length]), tuple(ids[cut]), tuple(trained[cut])))
    return found


def segments_of(packed: PackedRows) -> list[tuple]:
    """The same, read back from the packed rows."""
    found = []
    for number in range(len(packed)):
        row = packed[number]
        for segment in range(row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            keys = ("tokens", "labels", "loss_mask")
            found.append(tuple(tuple(row[key][inside].tolist()) for key in keys))
            assert row["position_ids"][inside].tolist() == list(range(inside.sum()))
    return found


def test_golden_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, [sharegpt("hello there", "good day", system="be brief")], tokenizer)
    row = build(tmp_path, 15)[0]
    ((ids, _),) = tokenizer.encode_batch(["be brief USER: hello there ASSISTANT: good day</s>"])
    assert len(ids) == 13
    assert row["tokens"].tolist() == [*ids[:-1], PAD, PAD, PAD]
    assert row["labels"].tolist() == [*ids[1:], PAD, PAD, PAD]
    assert row["loss_mask"].tolist() == [0] * 9 + [1, 1, 1] + [0] * 3
    assert row["position_ids"].tolist() == [*range(12), 0, 0, 0]
    assert row["segment_ids"].tolist() == [0] * 12 + [-1] * 3
    assert row["padding_mask"].tolist() == [False] * 12 + [True] * 3
    kinds = {key: value.dtype for key, value in row.items()}
    assert kinds["loss_mask"] == np.float32
    assert kinds["padding_mask"] == np.bool_
    assert all(kinds[key] == np.int64 for key in ("tokens", "labels", "position_ids", "segment_ids"))


def test_every_example_is_in_the_rows_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = varied_rows(60)
    prepare(tmp_path, rows, tokenizer)
    packed = build(tmp_path, 512)
    segments = segments_of(packed)
    assert len(segments) == len(rows)
    assert set(segments) == examples_of(rows, tokenizer, 512)
    report = packed.packing_report
    assert (report.examples, report.dropped_overlong, report.truncated, report.untrained) == (60, 0, 0, 0)
    assert report.rows == len(packed) < 60
    assert report.tokens == sum(len(tokens) for tokens, _, _ in segments)
    assert report.useful_token_share == report.tokens / (512 * len(packed))
    assert packed.packing_report.examples == 60
    assert packed.mean_examples_per_row == 60 / len(packed)
    assert packed.packed.most_segments == 2 + max(
        packed[row]["segment_ids"].max() for row in range(len(packed))
    )


@pytest.mark.parametrize("seq_length", [20, 40, 60, 75, 90, 120, 200])
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_I12_overlong_examples_are_counted_and_none_is_lost(
    tmp_path: Path, tokenizer: Tokenizer, seq_length: int, overlong: str
) -> None:
    rows = varied_rows(40)
    source = prepare(tmp_path, rows, tokenizer)
    expected = examples_of(rows, tokenizer, seq_length)
    if overlong == "drop":
        whole = examples_of(rows, tokenizer, 10**6)
        expected = {example for example in whole if len(example[0]) <= seq_length}
    expected = {example for example in expected if any(example[2])}
    if not expected:
        with pytest.raises(InputError, match="no row results"):
            build(tmp_path, seq_length, overlong=overlong)
        return
    packed = build(tmp_path, seq_length, overlong=overlong)
    assert set(segments_of(packed)) == expected
    report = packed.packing_report
    assert report.examples + report.dropped_overlong + report.untrained == source.examples == 40
    lengths = [len(example[0]) for example in examples_of(rows, tokenizer, 10**6)]
    too_long = sum(length > seq_length for length in lengths)
    assert report.dropped_overlong == (too_long if overlong == "drop" else 0)
    assert report.truncated == (too_long - report.untrained if overlong == "truncate" else 0)


def test_without_packing_each_row_holds_one_example(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = varied_rows(40)
    prepare(tmp_path, rows, tokenizer)
    alone = build(tmp_path, 512, packing=False)
    assert len(alone) == alone.packing_report.examples == 40
    assert all(alone[row]["segment_ids"].max() == 0 for row in range(len(alone)))
    assert alone.packed.most_segments == 2
    assert set(segments_of(alone)) == examples_of(rows, tokenizer, 512)
    assert segments_of(alone) == segments_of(build(tmp_path, 512, packing=False))
    assert segments_of(alone) != segments_of(build(tmp_path, 512, packing=False, seed=8))
    assert alone.packing_report.useful_token_share < build(tmp_path, 512).packing_report.useful_token_share


def test_overlong_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [sharegpt("hi", "good day"), sharegpt("hi", "four " * 100)]
    longest = prepare(tmp_path, rows, tokenizer).max_length - 1
    with pytest.raises(InputError, match=f"1 of 2 examples .* longest takes {longest} positions"):
        build(tmp_path, longest - 1, overlong="error")
    assert build(tmp_path, longest, overlong="error").packing_report.examples == 2


def test_nothing_trained_left_after_truncation(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, [sharegpt("what is " * 50, "two"), sharegpt("a", "b", system="s")], tokenizer)
    report = build(tmp_path, 20, overlong="truncate").packing_report
    assert (report.examples, report.untrained, report.truncated) == (1, 1, 0)


def test_bad_settings(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, varied_rows(3), tokenizer)
    with pytest.raises(InputError, match="'chop' is unknown; use drop, truncate, "):
        build(tmp_path, 64, overlong="chop")
    with pytest.raises(InputError, match="at least one position"):
        build(tmp_path, 0)
    with pytest.raises(InputError, match="not a prepared source"):
        build(tmp_path / "elsewhere", 64)


def test_rows_out_of_range(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, varied_rows(5), tokenizer)
    packed = build(tmp_path, 512)
    for row in (-1, len(packed)):
        with pytest.raises(IndexError):
            packed[row]


def same(first: PackedRows, second: PackedRows) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(first[row][key], second[row][key]) for row in range(len(first)) for key in first[row]
    )


def test_seed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, varied_rows(40), tokenizer)
    assert same(build(tmp_path, 300), build(tmp_path, 300))
    assert not same(build(tmp_path, 300), build(tmp_path, 300, seed=8))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("multiple", [2, 12, 60])
def test_examples_are_padded_to_a_multiple(
    tmp_path: Path, tokenizer: Tokenizer, multiple: int, packing: bool
) -> None:
    """The same examples, each with its padding in its own segment; all that is no example is masked."""
    prepare(tmp_path, varied_rows(40), tokenizer)
    settings = {"overlong": "truncate", "packing": packing}
    plain = build(tmp_path, 300, **settings)
    padded = build(tmp_path, 300, segment_multiple=multiple, **settings)
    held = []
    for row in (padded[number] for number in range(len(padded))):
        borders = np.flatnonzero(np.diff(row["segment_ids"])) + 1
        assert (borders % multiple == 0).all() and not row["loss_mask"][row["padding_mask"]].any()
        for segment in range(row["segment_ids"].max() + 1):
            mine = row["segment_ids"] == segment
            real = int((~row["padding_mask"][mine]).sum())
            assert mine.sum() - multiple < real <= mine.sum()
            assert row["padding_mask"][mine][real:].all() and (row["tokens"][mine][real:] == PAD).all()
            assert row["position_ids"][mine][:real].tolist() == list(range(real))
            held.append(
                tuple(tuple(row[key][mine][:real].tolist()) for key in ("tokens", "labels", "loss_mask"))
            )
    assert sorted(held) == sorted(segments_of(plain))
    assert padded.packing_report.tokens == plain.packing_report.tokens
    assert padded.packing_report.rows >= plain.packing_report.rows


def test_cache(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, varied_rows(40), tokenizer)
    cache = tmp_path / "deep" / "cache"
    first = build(tmp_path, 300, cache_dir=cache)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("megatron_dynmix.data.packed.pack", None)
        assert same(first, build(tmp_path, 300, cache_dir=cache))
    for options in ({"seed": 8}, {"overlong": "truncate"}):
        build(tmp_path, 300, cache_dir=cache, **options)
    build(tmp_path, 301, cache_dir=cache)
    build(tmp_path, 300, cache_dir=cache, segment_multiple=4)
    assert len(list(cache.iterdir())) == 5
    file.write_bytes(file.read_bytes()[:100])
    assert same(first, build(tmp_path, 300, cache_dir=cache))
    prepare(tmp_path, varied_rows(40, seed=1), tokenizer)
    build(tmp_path, 300, cache_dir=cache)
    assert len(list(cache.iterdir())) == 6
    assert all(path.suffix == ".npz" for path in cache.iterdir())


def test_cache_that_cannot_be_written_is_done_without(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, varied_rows(9), tokenizer)
    (tmp_path / "file").touch()
    assert same(build(tmp_path, 90, cache_dir=tmp_path / "file"), build(tmp_path, 90))


def test_pickle_reopens_the_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, varied_rows(40), tokenizer)
    packed = build(tmp_path, 300)
    data = pickle.dumps(packed)
    assert len(data) < (tmp_path / "source.bin").stat().st_size
    assert same(packed, pickle.loads(data))


def test_worker_processes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, varied_rows(40), tokenizer)
    packed = build(tmp_path, 300)
    rows = list(DataLoader(packed, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    assert len(rows) == len(packed)
    assert all(np.array_equal(row["tokens"], packed[number]["tokens"]) for number, row in enumerate(rows))
