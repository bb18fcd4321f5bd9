"""`signals.bin`: what was measured survives exactly, kills and resumes included; damage is named."""

from dataclasses import replace

import numpy as np
import pytest
from test_monitor import mixing_update

from megatron_dynmix.errors import InputError, TrainingStopped
from megatron_dynmix.records.jsonl import read_lines
from megatron_dynmix.records.schema import MixingUpdate
from megatron_dynmix.records.signals import SIGNALS, SignalWriter, packed, unpacked, with_signal
from megatron_dynmix.records.writer import MetricsWriter


def update_with_counts(iteration):
    rng = np.random.default_rng(iteration)
    return mixing_update(
        iteration, load=rng.random((3, 2, 4)), counts={"half_counts": rng.integers(0, 300, (2, 3, 2, 4))}
    )


@pytest.fixture
def run_dir(tmp_path):
    writer = MetricsWriter(tmp_path, resume_iteration=None)
    for iteration in (10, 20, 30):
        writer.mixing(update_with_counts(iteration))
    writer.close()
    return tmp_path


def found(run_dir):
    return {update.iteration: update for update in read_lines(run_dir / "mixing.jsonl", MixingUpdate)}


def check(run_dir, *iterations):
    updates = found(run_dir)
    assert tuple(updates) == iterations
    for iteration, update in updates.items():
        back, there = with_signal(update, run_dir / SIGNALS), update_with_counts(iteration)
        assert np.array_equal(back.counts["half_counts"], there.counts["half_counts"])
        assert np.array_equal(back.load, there.load)
    end = max(update.block.offset + update.block.size for update in updates.values())
    assert (run_dir / SIGNALS).stat().st_size == end


@pytest.mark.parametrize(
    ("values", "bytes_each"),
    [([0, 255], 1), ([0, 256], 2), ([0, 2**40], 8), ([-1, 5], 8), ([0.1, np.nan], 8), ([], 8)],
)
def test_numbers_come_back_exactly_and_take_little_room(values, bytes_each):
    array = np.array(values, np.float64 if 0.1 in values else np.int64)
    back = unpacked(packed({"counts": array}))["counts"]
    assert back.dtype == array.dtype and np.array_equal(back, array, equal_nan=array.dtype == np.float64)
    many = np.resize(array, 1000 * len(values))
    assert len(packed({"counts": many})) < bytes_each * many.size + 400


def test_what_was_measured_comes_back(run_dir):
    check(run_dir, 10, 20, 30)


def test_a_resumed_run_cuts_off_what_lies_after_its_checkpoint(run_dir):
    before = (run_dir / SIGNALS).read_bytes()
    writer = MetricsWriter(run_dir, resume_iteration=20)
    writer.mixing(update_with_counts(30))
    writer.close()
    check(run_dir, 10, 20, 30)
    assert (run_dir / SIGNALS).read_bytes() == before
    MetricsWriter(run_dir, resume_iteration=0).close()
    assert (run_dir / SIGNALS).read_bytes() == b""


def test_a_block_whose_line_a_kill_prevented_is_cut_off(run_dir):
    with (run_dir / SIGNALS).open("ab") as file:
        file.write(b"half a block")
    MetricsWriter(run_dir, resume_iteration=30).close()
    check(run_dir, 10, 20, 30)


def test_a_file_that_was_lost_is_said_and_no_later_block_takes_its_place(run_dir, caplog):
    (run_dir / SIGNALS).unlink()
    writer = MetricsWriter(run_dir, resume_iteration=20)
    writer.mixing(update_with_counts(30))
    writer.close()
    assert "signals of updates are lost" in caplog.text
    updates = found(run_dir)
    assert with_signal(updates[30], run_dir / SIGNALS).counts
    for iteration in (10, 20):
        with pytest.raises(InputError, match=f"signals.bin: the signal of iteration {iteration} is lost"):
            with_signal(updates[iteration], run_dir / SIGNALS)


def test_damage_and_lines_that_point_elsewhere_are_named(run_dir):
    updates = found(run_dir)
    wrong = replace(updates[10], block=updates[20].block)
    assert with_signal(wrong, run_dir / SIGNALS).counts, "a digest tells blocks apart, not updates"
    data = bytearray((run_dir / SIGNALS).read_bytes())
    data[updates[20].block.offset + 300] ^= 1
    (run_dir / SIGNALS).write_bytes(data)
    with pytest.raises(InputError, match=r"iteration 20 is lost: the .* bytes from .* are not those"):
        with_signal(updates[20], run_dir / SIGNALS)
    (run_dir / SIGNALS).unlink()
    with pytest.raises(InputError, match="iteration 10 is lost: No such file"):
        with_signal(updates[10], run_dir / SIGNALS)


def test_a_new_run_does_not_write_behind_the_signals_of_another(run_dir):
    (run_dir / "mixing.jsonl").unlink()
    with pytest.raises(InputError, match=r"signals\.bin holds the records of another run"):
        MetricsWriter(run_dir, resume_iteration=None)


def test_a_full_disk_stops_the_run_and_names_the_file(tmp_path):
    writer = SignalWriter(tmp_path / SIGNALS, [])
    writer._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(TrainingStopped, match=r"signals.bin cannot be written \(No space left on dev"):
        writer.append({"counts": np.ones(5, np.int64)})
