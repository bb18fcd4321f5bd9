"""Checksums of a folder, and which checkpoint is the newest good one. Folders here hold no tensors."""

import json

import pytest
from blake3 import blake3

from megatron_dynmix.checkpoint.folder import (
    BLOCK,
    CHECKSUMS,
    TRACKER,
    check_contents,
    check_whole,
    checksum,
    checksums_text,
    complete,
    exact,
    files_of,
    folder_of,
    has_checkpoint,
    newest_good,
    read_checksums,
    saved_iterations,
)
from megatron_dynmix.checkpoint.run_state import RUN_STATE, Damaged, SavedModel
from megatron_dynmix.errors import InputError


def make(directory, iteration, *, shard=b"shard"):
    """A whole checkpoint folder."""
    folder = folder_of(directory, iteration)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(shard)
    (folder / ".metadata").write_bytes(b"metadata")
    complete(folder, SavedModel(config={}).text(), {})
    return folder


@pytest.fixture
def directory(tmp_path):
    """Checkpoints 10, 20 and 30; the tracker names the last."""
    for iteration in (10, 20, 30):
        make(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("30")
    return tmp_path


def test_checksum_is_the_files_size_and_digest(tmp_path):
    content = bytes(range(256)) * (BLOCK // 100)
    (tmp_path / "file").write_bytes(content)
    assert len(content) > 2 * BLOCK
    assert checksum(tmp_path / "file") == (len(content), f"blake3:{blake3(content).hexdigest()}")


def test_every_file_but_the_list_itself_is_listed(tmp_path):
    folder = make(tmp_path, 1)
    assert set(read_checksums(folder)) == {"__0_0.distcp", ".metadata", RUN_STATE}
    check_whole(folder)
    check_contents(folder, read_checksums(folder), read_checksums(folder))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_by_content_alone(tmp_path):
    folder = make(tmp_path, 1)
    sums = read_checksums(folder)
    flip(folder / "__0_0.distcp")
    check_whole(folder)
    with pytest.raises(Damaged) as damage:
        check_contents(folder, sums, sums)
    expected, found = f"blake3:{blake3(b'shard').hexdigest()}", checksum(folder / "__0_0.distcp")[1]
    assert str(damage.value) == f"__0_0.distcp: expected {expected}, found {found}"
    check_contents(folder, sums, [".metadata", RUN_STATE])  # another rank's share


DAMAGES = {
    "shard is missing": (
        lambda folder: (folder / "__0_0.distcp").unlink(),
        "__0_0.distcp: expected 5 bytes, found no such file",
    ),
    "shard is cut": (
        lambda folder: (folder / "__0_0.distcp").write_bytes(b"sha"),
        "__0_0.distcp: expected 5 bytes, found 3",
    ),
    "not whole": (lambda folder: (folder / CHECKSUMS).unlink(), "it was not written to its end"),
    "list is cut": (
        lambda folder: (folder / CHECKSUMS).write_text('{"a": [1'),
        f"{CHECKSUMS} cannot be read",
    ),
    "list is no list": (lambda folder: (folder / CHECKSUMS).write_text("[1]"), f"{CHECKSUMS} cannot be read"),
    "list is empty": (lambda folder: (folder / CHECKSUMS).write_text("{}"), f"{CHECKSUMS} names no file"),
    "list is not text": (
        lambda folder: (folder / CHECKSUMS).write_bytes(b"\xff"),
        f"{CHECKSUMS} cannot be read",
    ),
    "run state is broken": (
        lambda folder: (folder / RUN_STATE).write_text("{" * len((folder / RUN_STATE).read_text())),
        f"{RUN_STATE} cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_older_checkpoint_is_used_in_place_of_a_damaged_one(damage, directory):
    break_it, why = DAMAGES[damage]
    break_it(folder_of(directory, 30))
    before = sorted(directory.rglob("*"))
    point = newest_good(directory)
    assert point.source == folder_of(directory, 20)
    (note,) = point.notes
    assert note.startswith(f"{folder_of(directory, 30)} is damaged: {why}")
    assert note.endswith(f"; {folder_of(directory, 20)} is used instead")
    assert sorted(directory.rglob("*")) == before and (directory / TRACKER).read_text() == "30"


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_of_another_checkpoint_are_not_taken_unasked(damage, directory):
    DAMAGES[damage][0](folder_of(directory, 30))
    with pytest.raises(InputError, match="iter_0000030 is damaged"):
        exact(newest_good(directory))


def test_no_good_checkpoint_left_is_refused_with_all_that_was_found(directory):
    for iteration in (10, 20, 30):
        (folder_of(directory, iteration) / "__0_0.distcp").unlink()
    with pytest.raises(InputError) as refusal:
        newest_good(directory)
    for iteration in (10, 20, 30):
        assert f"{folder_of(directory, iteration)} is damaged: __0_0.distcp: expected 5 bytes" in str(
            refusal.value
        )
    assert "no good checkpoint is left" in str(refusal.value) and "--run-dir" in str(refusal.value)


def test_content_found_damaged_leads_to_the_one_before(directory):
    point = newest_good(directory, {folder_of(directory, 30): "__0_0.distcp: expected a, found b"})
    assert point.source == folder_of(directory, 20)
    assert "__0_0.distcp: expected a, found b" in point.notes[0]


def test_newer_checkpoints_than_the_trackers_are_not_chosen(directory):
    (directory / TRACKER).write_text("20")
    assert newest_good(directory).source == folder_of(directory, 20)
    assert not newest_good(directory).notes
    (folder_of(directory, 20) / ".metadata").unlink()
    assert newest_good(directory).source == folder_of(directory, 10)


@pytest.mark.parametrize("tracker", [None, "", "  ", "soon", "-3", "\u0663\u0660"])
def test_without_a_tracker_that_can_be_read_the_newest_good_one_is_used(tracker, directory):
    if tracker is None:
        (directory / TRACKER).unlink()
    else:
        (directory / TRACKER).write_text(tracker, encoding="utf-8")
    (folder_of(directory, 30) / CHECKSUMS).unlink()
    point = newest_good(directory)
    assert point.source == folder_of(directory, 20)
    assert str(directory / TRACKER) in point.notes[0]
    assert point.notes[-1].endswith(f"{folder_of(directory, 20)} is used instead")


def test_a_tracker_that_is_ahead_of_the_folders_leads_to_the_newest(directory):
    (directory / TRACKER).write_text("40")
    point = newest_good(directory)
    assert point.source == folder_of(directory, 30)
    assert "names iteration 40, but there is no folder" in point.notes[0]


def test_a_tracker_that_is_behind_all_folders_is_refused_with_what_would_do(directory):
    (directory / TRACKER).write_text("5")
    with pytest.raises(InputError, match=r"names iteration 5, but .* write 30 into it"):
        newest_good(directory)


@pytest.mark.parametrize(("version", "age"), [(99, "a newer"), (1, "an older")])
def test_another_version_is_refused_and_not_passed_over(directory, version, age):
    folder = folder_of(directory, 30)
    (folder / RUN_STATE).write_text(json.dumps({"format_version": version}))
    sums = {name: checksum(folder / name) for name in files_of(folder)}
    (folder / CHECKSUMS).write_text(checksums_text(sums))
    with pytest.raises(InputError, match=f"written by {age} version"):
        newest_good(directory)


def test_only_whole_names_are_checkpoints(tmp_path):
    assert not has_checkpoint(tmp_path / "none") and not has_checkpoint(tmp_path)
    for name in (".iter_0000010.tmp", ".iter_0000010.old", "iter_x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000099").write_text("a file")
    assert not has_checkpoint(tmp_path) and saved_iterations(tmp_path) == []
    with pytest.raises(InputError, match="holds no checkpoint"):
        newest_good(tmp_path)
    make(tmp_path, 12_345_678)
    make(tmp_path, 9)
    assert has_checkpoint(tmp_path) and saved_iterations(tmp_path) == [12_345_678, 9]
