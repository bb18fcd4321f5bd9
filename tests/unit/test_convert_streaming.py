"""Weights written and read in parts, both ways: bit for bit, with little memory, stopped at any point."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from convert_fixtures import InMemory
from safetensors.torch import load_file

from megatron_dynmix.checkpoint.folder import check_contents
from megatron_dynmix.convert import staging, tensors, to_megatron
from megatron_dynmix.convert.export_hf import shards_of, size_in_bytes, write_weights
from megatron_dynmix.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_dynmix.convert.model_map import weight_map
from megatron_dynmix.convert.staging import Staging, partial_of
from megatron_dynmix.convert.tensors import Box, Cast, as_hugging_face, as_megatron, boxes_of
from megatron_dynmix.convert.to_megatron import write_checkpoint
from megatron_dynmix.convert.verdict import compare_values
from megatron_dynmix.convert.weight_files import INDEX
from megatron_dynmix.errors import InputError

SETTINGS = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_query_groups": 3,
    "vocab_size": 101,
    "num_moe_experts": 4,
    "ffn_hidden_size": 20,
}
NAMES = weight_map(SETTINGS, {"model_type": "mixtral"}, padded_vocab=128)
ITER = "iter_0000000"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several boxes to a tensor, several tensors to a part."""
    monkeypatch.setattr(tensors, "BOX_BYTES", 1000)
    monkeypatch.setattr(to_megatron, "PART_BYTES", 20000)


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(3)
    return InMemory(
        {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in NAMES.hf_shapes.items()}
    )


def ignore(*_):
    """Nobody is told."""


def by_name(box):
    return box.name, box.offset


def write_hf(tensors, place, max_shard_bytes, advance=ignore):
    write_weights(
        tensors,
        place.folder,
        max_shard_bytes=max_shard_bytes,
        finished=place.finished,
        finish=place.record,
        advance=advance,
    )


def write_megatron(model, place, advance=ignore):
    return write_checkpoint(as_megatron(model, NAMES), by_name, place, ITER, advance=advance)


def written_checkpoint(model, final):
    with Staging(final, {}, ignore) as place:
        write_megatron(model, place)
        place.complete()
    return MegatronCheckpoint(final / ITER)


def loaded(folder: Path):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found, tensors):
    assert found.keys() == tensors.keys()
    differing = [name for name in tensors if not torch.equal(found[name], tensors[name])]
    assert not differing


def whole(tensors, name):
    shape = tensors.shapes[name]
    return tensors.read(name, (0,) * len(shape), shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (300, 5), (2, 3, 40, 24), (3, 2000), (1, 1)])
def test_boxes_fill_a_tensor_in_its_order(shape, dtype):
    found = list(boxes_of(InMemory({"x": torch.empty(shape, dtype=dtype)}), "x"))
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [
        numbers[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] for box in found
    ]
    assert torch.equal(torch.cat([part.flatten() for part in parts]), numbers.flatten())
    row = dtype.itemsize * (shape[-1] if len(shape) > 1 else 1)
    for box, part in zip(found, parts, strict=True):
        assert part.shape == box.shape
        assert box.nbytes == dtype.itemsize * part.numel() <= max(1000, row)


def test_hf_to_megatron_to_hf_is_bit_equal_in_parts(model, tmp_path):
    checkpoint = written_checkpoint(model, tmp_path / "megatron")
    assert len(list((tmp_path / "megatron" / ITER).glob("*.distcp"))) > 2
    assert checkpoint.shapes == NAMES.megatron_shapes
    assert set(checkpoint.dtypes.values()) == {torch.bfloat16}
    assert not whole(checkpoint, "embedding.word_embeddings.weight")[101:].any(), "padding holds something"

    back = as_hugging_face(checkpoint, NAMES)
    with Staging(tmp_path / "hf", {}, ignore) as place:
        write_hf(back, place, 30_000)
        place.complete()
    assert_same(loaded(tmp_path / "hf"), model.tensors)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.tensors.values())
    files = sorted(path.name for path in (tmp_path / "hf").iterdir() if path.name != INDEX)
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == model.tensors.keys()
    for file in files:
        assert load_file(tmp_path / "hf" / file).keys() == {
            name for name, where in index["weight_map"].items() if where == file
        }
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir()), "staging is left"


def test_what_several_ranks_write_is_what_one_writes(model, tmp_path):
    shares = []
    for world in (1, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        for rank in range(world):
            files = []
            write_weights(model, folder, max_shard_bytes=20_000, rank=rank, world=world, finish=files.append)
            shares.append(len(files))
    one, several = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in "13")
    assert one == several and INDEX in one
    assert shares[0] == sum(shares[1:]) == len(one) - 1
    assert all(shares), "every rank has some to write"


def test_checksums_are_those_of_the_files(model, tmp_path):
    with Staging(tmp_path / "out", {}, ignore) as place:
        sums = write_megatron(model, place)
        folder = place.folder / ITER
        assert sums.keys() == {path.name for path in folder.glob("*.distcp")}
        check_contents(folder, sums, sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_is_cast_on_the_way(model, tmp_path, dtype):
    with Staging(tmp_path / "hf", {}, ignore) as place:
        write_hf(Cast(model, dtype), place, 10**9)
        place.complete()
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["model.safetensors"], (
        "one file needs no index"
    )
    assert_same(loaded(tmp_path / "hf"), {name: tensor.to(dtype) for name, tensor in model.tensors.items()})


@pytest.mark.parametrize(("number", "dtype"), [(70_000.0, torch.float16), (-3.4e38, torch.bfloat16)])
def test_a_number_that_its_type_has_no_room_for_is_named(number, dtype):
    held = InMemory({"w": torch.tensor([[1.0, float("inf")], [number, float("nan")]])})
    with pytest.raises(
        InputError, match=rf"w holds {re.escape(f'{number:g}')}, and {str(dtype)[6:]} ends at"
    ):
        Cast(held, dtype).read("w", (0, 0), (2, 2))
    assert Cast(held, dtype).read("w", (0, 0), (1, 2)).isinf().sum() == 1, "what was infinite stays so"
    assert Cast(held, dtype, {"w"}).read("w", (0, 0), (2, 2))[1, 0] == torch.tensor(number)


def test_tensors_of_two_types_lie_without_gaps(tmp_path):
    tensors = {"a": torch.arange(3).bfloat16(), "b": torch.arange(5.0), "c": torch.arange(7).half()}
    with Staging(tmp_path / "hf", {}, ignore) as place:
        write_hf(InMemory(tensors), place, 10**9)
        place.complete()
    assert_same(loaded(tmp_path / "hf"), tensors)


def grid(tensors, name):
    """As ranks of a tensor-parallel layout cut a tensor: columns apart too, of uneven width."""
    height, width = tensors.shapes[name]
    yield from (
        Box(name, (row, column), (rows, columns), tensors.dtypes[name].itemsize * rows * columns)
        for row, rows in ((0, 7), (7, height - 7))
        for column, columns in ((0, 3), (3, width - 3))
    )


@pytest.fixture
def cut_in_columns(tmp_path, monkeypatch):
    """A checkpoint of one tensor in four chunks, and the tensor."""
    tensors = {"x": torch.arange(31 * 10.0).view(31, 10)}
    monkeypatch.setattr(to_megatron, "boxes_of", grid)
    with Staging(tmp_path / "out", {}, ignore) as place:
        write_checkpoint(InMemory(tensors), by_name, place, ITER, advance=ignore)
        place.complete()
    return MegatronCheckpoint(tmp_path / "out" / ITER), tensors["x"]


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((0, 0), (31, 10)), ((5, 2), (9, 4)), ((8, 4), (3, 2)), ((30, 9), (1, 1)), ((0, 0), (7, 3))],
)
def test_boxes_are_read_across_the_chunks_of_any_layout(cut_in_columns, offset, shape):
    checkpoint, x = cut_in_columns
    wanted = x[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    assert torch.equal(checkpoint.read("x", offset, shape), wanted)


def test_no_more_is_read_than_from_a_boxs_first_number_to_its_last(cut_in_columns, monkeypatch):
    checkpoint, x = cut_in_columns
    checkpoint.read("x", (0, 0), (31, 10))  # the outlines of all chunks are known then
    counts = []
    readv = os.readv
    monkeypatch.setattr(os, "readv", lambda *args: counts.append(readv(*args)) or counts[-1])
    checkpoint.read("x", (8, 4), (3, 2))  # in a chunk that is 7 wide: two rows of 7, and 2 of the third
    assert counts == [x.itemsize * (7 + 7 + 2)]


def test_a_box_that_no_chunk_holds_is_refused(cut_in_columns):
    checkpoint, _ = cut_in_columns
    with pytest.raises(InputError, match="x is not whole"):
        checkpoint.read("x", (30, 0), (2, 10))


class Stop(Exception):
    """Something ends the process."""


def stop_after(count):
    """Ends a conversion once it has been told of so many bytes."""
    told = [0]

    def advance(nbytes):
        told[0] += nbytes
        if told[0] > count:
            raise Stop

    return advance


@pytest.mark.parametrize("way", ["megatron", "hf"])
def test_a_conversion_goes_on_where_it_stopped(model, tmp_path, way):
    def write(place, advance):
        if way == "megatron":
            write_megatron(model, place, advance)
        else:
            write_hf(model, place, 20_000, advance)

    total = sum(tensor.nbytes for tensor in model.tensors.values())
    with pytest.raises(Stop), Staging(tmp_path / "out", {"a": 1}, ignore) as place:
        write(place, stop_after(total // 2))
    assert not (tmp_path / "out").exists()
    said = []
    with Staging(tmp_path / "out", {"a": 1}, said.append) as place:
        before = {name: (place.folder / name).stat().st_mtime_ns for name in place.finished}
        assert before, "nothing was kept"
        assert len(said) == 1
        assert f"{len(before)} files are there already" in said[0]
        told = []
        write(place, told.append)
        assert {name: (place.folder / name).stat().st_mtime_ns for name in before} == before, "written again"
        place.complete()
    if way == "megatron":
        checkpoint = MegatronCheckpoint(tmp_path / "out" / ITER)
        verdicts = compare_values(model, as_hugging_face(checkpoint, NAMES), NAMES)
        assert not any(verdict.differing for verdict in verdicts)
        assert sum(told) >= total, "what is there already counts as done"
    else:
        assert_same(loaded(tmp_path / "out"), model.tensors)
        assert sum(told) == total


def test_a_file_that_is_not_what_was_noted_is_written_again(model, tmp_path):
    with Staging(tmp_path / "out", {}, ignore) as place:
        write_hf(model, place, 20_000)
        (place.folder / "model-00001-of-00003.safetensors").write_bytes(b"short")
    with Staging(tmp_path / "out", {}, ignore) as place:
        assert "model-00001-of-00003.safetensors" not in place.finished
        assert "model-00002-of-00003.safetensors" in place.finished
        write_hf(model, place, 20_000)
        place.complete()
    assert_same(loaded(tmp_path / "out"), model.tensors)


def test_a_partial_folder_of_something_else_is_begun_again_with_a_word(model, tmp_path):
    with Staging(tmp_path / "out", {"source": "a", "dtype": None}, ignore) as place:
        write_hf(model, place, 20_000)
    said = []
    with Staging(tmp_path / "out", {"source": "b", "dtype": None}, said.append) as place:
        assert not place.finished
        assert not list(place.folder.glob("*.safetensors"))
    assert len(said) == 1
    assert "another source: starting over" in said[0]


def test_a_line_that_a_crash_cut_short_is_not_believed(model, tmp_path):
    with Staging(tmp_path / "out", {}, ignore) as place:
        write_hf(model, place, 20_000)
        journal = place.folder / staging.FINISHED
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]) + lines[2][:9])
    with Staging(tmp_path / "out", {}, ignore) as place:
        assert len(place.finished) == 2
        write_hf(model, place, 20_000)
        assert len(place.finished) == len(lines)
    with Staging(tmp_path / "out", {}, ignore) as place:
        assert len(place.finished) == len(lines), "lines after the broken one are lost"


def test_only_one_process_writes_a_folder(tmp_path):
    with (
        Staging(tmp_path / "out", {}, ignore),
        pytest.raises(InputError, match="in use by a conversion to"),
    ):
        Staging(tmp_path / "out", {}, ignore)


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_filled(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with Staging(out, {}, ignore) as place:
        write_hf(model, place, 10**9)
        place.complete()
    assert_same(loaded(out), model.tensors)
    with pytest.raises(InputError, match="is there already and is not an empty folder"):
        Staging(out, {}, ignore)
    assert not partial_of(out).exists()


def test_a_name_that_was_taken_meanwhile_costs_nothing(model, tmp_path):
    with Staging(tmp_path / "out", {}, ignore) as place:
        write_hf(model, place, 10**9)
        (tmp_path / "out").write_text("of somebody else")
        with pytest.raises(InputError, match=r"out has been made by something else since"):
            place.complete()
    (tmp_path / "out").unlink()
    with Staging(tmp_path / "out", {}, ignore) as place:
        assert place.finished
        place.complete()
    assert_same(loaded(tmp_path / "out"), model.tensors)


def test_a_name_that_no_folder_can_get_is_told_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("/", tmp_path / "link"):
        with pytest.raises(InputError, match="is there already"):
            Staging(Path(name), {}, ignore)
    for name in (tmp_path / "file" / "out", tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match=r"cannot be made \(.*\); give a name"):
            Staging(name, {}, ignore)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("way", ["megatron", "hf"])
def test_a_disk_that_becomes_full_is_one_message(model, tmp_path, way):
    with (
        pytest.raises(InputError, match=r"the disk is full: .* resumes from there"),
        Staging(tmp_path / "out", {}, ignore) as place,
    ):
        name = f"{ITER}/__1_0.distcp" if way == "megatron" else "model-00002-of-00003.safetensors"
        (place.folder / name).parent.mkdir(exist_ok=True)
        (place.folder / name).symlink_to("/dev/full")  # writing there fails with ENOSPC
        if way == "megatron":
            write_megatron(model, place)
        else:
            write_hf(model, place, 20_000)
    assert not (tmp_path / "out").exists()
    with Staging(tmp_path / "out", {}, ignore) as place:
        assert place.finished, "what was written before is kept"


def test_other_errors_of_the_disk_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="I/O"), Staging(tmp_path / "out", {}, ignore):
        raise OSError(errno.EIO, "I/O")


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with (
        Staging(tmp_path / "out", {}, ignore) as place,
        pytest.raises(InputError, match=r"5\.00 GB are needed and 3\.00 GB are free"),
    ):
        place.check_space(5_000_000_000)
    assert not list(tmp_path.iterdir())
    with Staging(tmp_path / "out", {}, ignore) as place:
        place.check_space(2_000_000_000)


def damage(folder, kind):
    path = sorted(folder.glob("*.distcp"))[0]
    if kind == "missing":
        path.unlink()
    elif kind == "short":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "no list":
        (folder / ".metadata").unlink()
    else:
        (folder / ".metadata").write_bytes(b"no pickle")


@pytest.mark.parametrize("kind", ["missing", "short", "no list", "bad list"])
def test_a_damaged_checkpoint_is_one_message(model, tmp_path, kind):
    written_checkpoint(model, tmp_path / "out")
    damage(tmp_path / "out" / ITER, kind)
    with pytest.raises(InputError, match=r"cannot be read|there is no \.metadata"):
        checkpoint = MegatronCheckpoint(tmp_path / "out" / ITER)
        for name in checkpoint.shapes:
            whole(checkpoint, name)


def test_a_changed_number_is_found_and_named(model, tmp_path):
    checkpoint = written_checkpoint(model, tmp_path / "out")
    changed = {name: tensor.clone() for name, tensor in model.tensors.items()}
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    changed[name][5, 7] += 1
    verdicts = compare_values(InMemory(changed), as_hugging_face(checkpoint, NAMES), NAMES)
    assert {verdict.group: verdict.differing for verdict in verdicts if verdict.differing} == {
        "experts": (name,)
    }
    (experts,) = (verdict for verdict in verdicts if verdict.group == "experts")
    assert experts.read_sum != experts.written_sum
    assert all(verdict.read_sum == verdict.written_sum for verdict in verdicts if verdict is not experts)
    assert sum(verdict.tensors for verdict in verdicts) == len(NAMES.hf_shapes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_may_round_and_no_more(model, dtype):
    """To the nearest number of the type, the smallest ones included; nothing else is called equal."""
    name = "model.norm.weight"
    given = {key: tensor.float() for key, tensor in model.tensors.items()}
    odd = [1e-7, -3e-8, 6e-5, 1.00390625, float("nan"), -float("inf")]
    given[name] = 1.0001 * torch.tensor(odd).repeat(4)
    cast = {key: tensor.to(dtype) for key, tensor in given.items()}

    def differing():
        verdicts = compare_values(InMemory(given), InMemory(cast), NAMES, dtype)
        return [one.differing for one in verdicts if one.differing]

    assert not differing()
    neighbor = torch.nextafter(cast[name][2], cast[name][3])
    for wrong in (neighbor, 0.0, float("inf"), float("nan")):
        cast[name][2] = wrong
        assert differing() == [(name,)], wrong


def test_numbers_that_are_none_and_signs_of_zero_are_compared_as_bits(model):
    name = "model.norm.weight"
    odd = {name: tensor.clone() for name, tensor in model.tensors.items()}
    odd[name][:2] = torch.tensor([float("nan"), 0.0])
    other = {**odd, name: odd[name].clone()}
    assert not any(one.differing for one in compare_values(InMemory(odd), InMemory(other), NAMES))
    other[name][1] = -0.0
    verdicts = compare_values(InMemory(odd), InMemory(other), NAMES)
    assert [one.differing for one in verdicts if one.differing] == [(name,)]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("30KB", 30_000), ("1.5 GiB", 3 << 29), ("12", 12), ("2mb", 2_000_000), ("7B", 7)],
)
def test_sizes_are_read(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 boxes", "0", "0GB", "5G"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="cannot be read"):
        size_in_bytes(text)


def test_shards_keep_their_limit_and_lose_nothing(model):
    for limit in (1, 5_000, 30_000, 10**9):
        shards = shards_of(model, limit)
        assert [name for names in shards.values() for name in names] == list(model.tensors)
        for names in shards.values():
            assert len(names) == 1 or sum(model.tensors[name].nbytes for name in names) <= limit
    assert list(shards_of(model, 10**9)) == ["model.safetensors"]
    assert next(iter(shards_of(model, 1))) == f"model-00001-of-{len(model.tensors):05d}.safetensors"
