import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from megatron_dynmix.data.prepare import progress, readers
from megatron_dynmix.data.prepare.readers import find_inputs, is_compressed, raw_rows, unread_files
from megatron_dynmix.errors import InputError

ROWS = [{"text": f'row {i} é\u2028 ["{{'} for i in range(700)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def values(path: Path) -> list:
    return [row.parse() for row in raw_rows(path)]


def bad(path: Path) -> list[tuple[str, str]]:
    found = []
    for row in raw_rows(path):
        try:
            row.parse()
        except ValueError as error:
            found.append((row.place, str(error)))
    return found


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", ARRAY),
        ("a.json", b"\xef\xbb\xbf \n" + ARRAY),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:])),
        ("a.json.gz", gzip.compress(ARRAY)),
        ("a.jsonl.zst", zstd(LINES)),
        ("a.JSON.ZST", zstd(ARRAY[:99]) + zstd(ARRAY[99:])),
        ("noname", gzip.compress(LINES)),
        ("noname", ARRAY),
    ],
)
def test_every_container_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    assert values(save(tmp_path / name, content)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=100)
    rows = list(raw_rows(path))
    assert [row.parse() for row in rows] == ROWS
    assert rows[-1].place == f"{path}:item 700"
    save(path, path.read_bytes()[:-40])
    with pytest.raises(InputError, match="damaged Parquet"):
        values(path)


def test_dataset_saved_to_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "all" / "train"
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(ROWS)
    names = []
    for number in range(2):
        names.append({"filename": f"data-{number}.arrow"})
        with ipc.new_stream(folder / names[-1]["filename"], table.schema) as stream:
            stream.write_table(table.slice(350 * number, 350))
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    assert find_inputs(folder) == [folder]
    assert values(folder) == ROWS
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match="holds the splits train of a dataset"):
        find_inputs(tmp_path / "all")
    (folder / "data-1.arrow").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        values(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(InputError, match="not a whole dataset"):
        values(folder)


def test_places(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", b'{"a": 1}\n\n{"b": 2}')
    assert [row.place for row in raw_rows(path)] == [f"{path}:1", f"{path}:3"]
    path = save(tmp_path / "a.json", b'[{"a": 1}, {"b": 2}]')
    assert [row.place for row in raw_rows(path)] == [f"{path}:item 1", f"{path}:item 2"]


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.jsonl", gzip.compress(LINES), "name it a.jsonl.gz, or decompress it: gunzip"),
        ("a.json", zstd(LINES), "name it a.json.zst, or decompress it: unzstd"),
        ("a.jsonl.gz", LINES, "not a .gz file as its name says"),
        ("a.jsonl.gz", zstd(LINES), "not a .gz file"),
        ("a.parquet", LINES, "not a .parquet file"),
        ("a.jsonl", b"PAR1", "name it .parquet"),
        ("a.jsonl", ARRAY, "name it .json, or write one object per line"),
        ("a.jsonl.gz", gzip.compress(ARRAY), "name it .json"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-500], "cut off"),
        ("a.jsonl.zst", zstd(LINES)[:-50], "Truncated"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINES)), "compressed twice"),
        ("a.jsonl.gz", gzip.compress(LINES.decode().encode("utf-16")), "iconv"),
        ("a.jsonl", b"BZh91", "bunzip2"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'[{"a": 1}, {"b": ', "item 2: the file ends inside the array"),
        ("a.json", b'[{"a": "1}, 2]', "item 1: the file ends inside the array"),
        ("a.json", b'[1] {"b": 2}', "something follows the array after item 1"),
        ("a.json", b"[1}", "closing brace"),
    ],
)
def test_I12_refused_files_say_why_and_what_to_do(
    tmp_path: Path, name: str, content: bytes, remedy: str
) -> None:
    path = save(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        values(path)
    assert str(path) in str(caught.value)
    assert remedy in str(caught.value)


def test_a_flipped_byte_in_a_gzip_file(tmp_path: Path) -> None:
    broken = bytearray(gzip.compress(LINES))
    broken[len(broken) // 2] ^= 0xFF
    path = save(tmp_path / "a.jsonl.gz", bytes(broken))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: .*(damaged|cannot be read|cut off)"):
        list(raw_rows(path))


def test_I12_a_bad_item_spoils_no_other(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.json", b'[{"a": 1}, {"a": NaN}, {"a": 1, "a": 2}, oops, {"b": [1,]}, {"c": "]"},]'
    )
    assert [place.removeprefix(f"{path}:") for place, _ in bad(path)] == [
        "item 2", "item 3", "item 4", "item 5", "item 7",
    ]  # fmt: skip
    assert "stands twice" in bad(path)[1][1]


TEXT = st.text(st.sampled_from('a"\\[]{},: \né'), max_size=12)


@given(
    rows=st.lists(st.dictionaries(TEXT, TEXT | st.lists(TEXT, max_size=3), max_size=3), min_size=1),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
)
def test_arrays_are_cut_at_the_same_items_whatever_the_chunk(
    tmp_path_factory: pytest.TempPathFactory, rows: list, chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK_BYTES", chunk)
        assert values(path) == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_row_without_end_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(readers, "_MAX_ROW_BYTES", 1 << 21)
    start = b'["' if name == "a.json" else b'{"a": "'
    with pytest.raises(InputError, match="longer than 2 MiB"):
        values(save(tmp_path / name, start + b"x" * (1 << 22)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    def peak(count: int) -> int:
        rows = [{"text": f"{i:09}" * 100} for i in range(count)]
        content = "\n".join(map(json.dumps, rows)).encode()
        path = tmp_path / name
        if name == "a.parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            body = json.dumps(rows).encode() if name == "a.json" else content
            save(
                path, gzip.compress(body, 1) if name.endswith("gz") else zstd(body) if "zst" in name else body
            )
        tracemalloc.start()
        assert sum(1 for _ in raw_rows(path)) == count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(8_000) < peak(2_000) + (3 << 20)


def test_files_that_a_path_means(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.jsonl.gz", "c.parquet", "readme.md", ".hidden.jsonl", "_part.json"]
    for name in names:
        save(tmp_path / name, b"x")
    assert find_inputs(tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]
    assert find_inputs(tmp_path) == [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl", "c.parquet")]
    assert find_inputs(tmp_path / "*.jsonl*") == [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl")]
    with pytest.raises(InputError, match="no such file, folder or pattern"):
        find_inputs(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file to read rows from"):
        find_inputs(tmp_path / "empty")


def test_pipe_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"a.jsonl: a pipe or device, and rows are read more than once"):
        find_inputs(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "total", "said"),
    [("a.jsonl", 4 << 20, "50%"), ("a.jsonl.gz", None, "2 MiB"), ("a.parquet", None, "2 MiB")],
)
def test_progress_gives_a_share_only_where_the_size_of_the_text_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys, name: str, total: int | None, said: str
) -> None:
    assert is_compressed(Path(name)) == (total is None)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress.ProgressBar("code", total) as shown:
        shown.advance(2 << 20, 7)
    assert f"code: {said}, 7 examples" in capsys.readouterr().err


def skippable(content: bytes = b"index") -> bytes:
    """A frame of zstd that holds no data."""
    return b"\x5e\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


def test_frames_of_zstd_without_data_are_passed_over(tmp_path: Path) -> None:
    content = skippable() + zstd(LINES[:2000]) + skippable(b"") + zstd(LINES[2000:]) + skippable()
    assert values(save(tmp_path / "a.jsonl.zst", content)) == ROWS
    with pytest.raises(InputError, match="zstd-compressed, which its name does not say"):
        values(save(tmp_path / "a.jsonl", content))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", json.dumps(ROWS[0], indent=2), "rows over several lines; write one object per line"),
        ("a.json", json.dumps(ROWS[0], indent=2) * 2, "rows over several lines"),
        ("a.json", "\ufeff\n" + json.dumps({"messages": [{"a": 1}]}, indent="\t"), "rows over several lines"),
        ("a.csv", "prompt,completion\na,b\n", "a table as text; export it as JSON Lines or Parquet"),
        ("a.TSV", "prompt\tcompletion\na\tb\n", "a table as text"),
    ],
)
def test_text_that_is_not_one_row_a_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        values(save(tmp_path / name, content.encode()))


def test_a_first_row_that_is_cut_off_is_one_bad_row(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", b'{"text": [1,\n' + LINES)
    assert [place for place, _ in bad(path)] == [f"{path}:1"]
    assert len(list(raw_rows(path))) == len(ROWS) + 1
    assert values(save(tmp_path / "a.csv", LINES)) == ROWS


def test_what_else_lies_in_a_folder_is_known(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "c.JSONL", "d.jsonl.bz2", ".hidden", "_SUCCESS", "e.txt"):
        save(tmp_path / name, LINES)
    (tmp_path / "sub").mkdir()
    assert [path.name for path in find_inputs(tmp_path)] == ["a.jsonl", "c.JSONL"]
    others = [f"{tmp_path}/{name}" for name in ("b.csv", "d.jsonl.bz2", "e.txt", "sub/")]
    assert list(unread_files(tmp_path)) == others
    assert unread_files(tmp_path / "a.jsonl") == ()
    for name in ("a.jsonl", "c.JSONL"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=r"holds no file to read rows from \(.*b.csv, .*sub/\)"):
        find_inputs(tmp_path)


def test_nulls_of_a_union_of_columns_are_not_data(tmp_path: Path) -> None:
    rows = [{"a": {"x": 1, "y": [{"z": None}, None]}}, {"b": "text"}]
    parquet.write_table(
        pyarrow.Table.from_pylist(
            rows,
            schema=pyarrow.schema(
                [
                    (
                        "a",
                        pyarrow.struct(
                            [
                                ("x", pyarrow.int64()),
                                ("y", pyarrow.list_(pyarrow.struct([("z", pyarrow.int8())]))),
                                ("w", pyarrow.string()),
                            ]
                        ),
                    ),
                    ("b", pyarrow.string()),
                ]
            ),
        ),
        tmp_path / "a.parquet",
    )
    assert values(tmp_path / "a.parquet") == [{"a": {"x": 1, "y": [{}, None]}}, {"b": "text"}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    assert values(save(tmp_path / "a.jsonl", lines)) == rows
