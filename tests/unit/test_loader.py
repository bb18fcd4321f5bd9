"""From the blend to the micro-batches of the ranks."""

import json
import os
import signal
import socket
import subprocess
from multiprocessing import reduction

import numpy as np
import pytest
import torch
from blend_fixtures import blend_of, sources
from torch.utils.data import Dataset

from megatron_dynmix.data.blend_plan import BlendPlan, BlendState
from megatron_dynmix.data.loader import BlendLoader, DrawnRows, collate, segment_borders

SIZES = (11, 5, 30)
STAGES = {16: (0.0, 0.9, 0.1), 40: (0.8, 0.1, 0.1), 64: (0.2, 0.3, 0.5)}
"""One at a chunk's end, one in the middle of a chunk, one at an end again."""
BATCH, CHUNK, STEPS = 8, 16, 12


def blend() -> BlendPlan:
    return blend_of(SIZES, (1, 1, 1), CHUNK)


def loader(
    blended: BlendPlan, micro: int = 4, rank: int = 0, ranks: int = 1, workers: int = 0
) -> BlendLoader:
    return BlendLoader(
        blended,
        sources(*SIZES),
        micro_batch_size=micro,
        dp_rank=rank,
        dp_size=ranks,
        num_workers=workers,
        pin_memory=False,
    )


def run(blended: BlendPlan, rank_loader: BlendLoader, micro_batches: int) -> list[torch.Tensor]:
    """Tokens of all micro-batches of a run that changes its weights."""
    batches = []
    for sample in range(0, STEPS * BATCH, BATCH):
        if sample in STAGES:
            blended.append_stage(sample, np.array(STAGES[sample]))
        for batch in rank_loader.step(sample, micro_batches):
            assert batch["dataset_id"].tolist() == batch["tokens"][:, 0].tolist()
            batches.append(batch["tokens"])
    return batches


def samples(batches: list[torch.Tensor]) -> list[list[int]]:
    return torch.cat(batches).tolist()


def one_rank() -> list[list[int]]:
    blended = blend()
    return samples(run(blended, loader(blended, BATCH), 1))


def test_a_row_tells_what_drew_it():
    item = DrawnRows(sources(*SIZES))[(2, 17, 1)]
    assert (item["dataset_id"].dtype, item["row"].dtype, item["half"].dtype) == (np.int16, np.int64, np.int8)
    assert [item[name] for name in ("dataset_id", "row", "half")] == [2, 17, 1]
    assert item["tokens"].tolist() == [2, 17]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_I3_the_order_does_not_depend_on_ranks_or_micro_batch_size(ranks, micro):
    count = BATCH // (micro * ranks)
    per_rank = []
    for rank in range(ranks):
        blended = blend()
        per_rank.append(run(blended, loader(blended, micro, rank, ranks), count))
    together = [batches[k] for k in range(STEPS * count) for batches in per_rank]
    assert samples(together) == one_rank()


def test_I4_the_ranks_share_no_sample_and_leave_none_out():
    rows = [row for source, row in one_rank() if source == 1]
    assert sorted(rows[:5]) == [0, 1, 2, 3, 4] and len(rows) > 10


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_never_bring_rows_of_old_weights(workers):
    blended = blend()
    assert samples(run(blended, loader(blended, 4, workers=workers), 2)) == one_rank()


def test_weights_loaded_from_a_checkpoint_are_in_force_at_once():
    """Also where the checkpoint's chunk begins at the sample at which the old one did."""
    other = blend_of(SIZES, (0, 0, 1), CHUNK)
    blended = blend()
    rank_loader = loader(blended, BATCH)
    rank_loader.step(0, 1)
    blended.resume(BlendState.from_json(json.loads(json.dumps(other.state.to_json()))))
    (batch,) = rank_loader.step(BATCH, 1)
    assert batch["dataset_id"].tolist() == [2] * BATCH


def test_I2_a_run_resumes_in_the_middle_of_a_chunk():
    first = blend()
    first_loader = loader(first, BATCH)
    expected = [first_loader.step(sample, 1)[0]["tokens"].tolist() for sample in (0, 8, 16)]
    resumed = blend()
    resumed.resume(first.state)
    expected.append(first_loader.step(24, 1)[0]["tokens"].tolist())
    assert loader(resumed, BATCH).step(24, 1)[0]["tokens"].tolist() == expected[-1]


def test_steps_may_be_asked_for_again():
    blended = blend()
    rank_loader = loader(blended, BATCH)
    first = rank_loader.step(0, 1)[0]["tokens"]
    assert rank_loader.step(0, 1)[0]["tokens"].equal(first)


def test_steps_may_change_their_size_and_cross_chunks():
    """As a batch that ramps up does: 4, 8, then 12 samples a step, chunks of 16."""
    blended, whole = blend_of(SIZES, (1, 2, 3), CHUNK), blend_of(SIZES, (1, 2, 3), CHUNK)
    rank_loader, sample, batches = loader(blended, 2, workers=1), 0, []
    for size in (4, 4, 8, 8, 12, 12, 12):
        batches += [batch["tokens"] for batch in rank_loader.step(sample, size // 2)]
        sample += size
    assert samples(batches) == [[source, row] for source, row, _ in whole.draws(0, sample)]


def test_workers_do_not_ask_beyond_the_next_update():
    blended = blend()
    asked = []
    draws = blended.draws
    blended.draws = lambda first, last: asked.append(last) or draws(first, last)
    rank_loader = loader(blended, 2, workers=2)
    for sample in (0, 4, 8):
        rank_loader.step(sample, 2, until=12)
    assert max(asked) == 12
    blended.append_stage(12, np.array([0.0, 0.5, 0.5]))
    rank_loader.step(12, 2, until=24)
    assert asked[6] == 14


def test_a_step_beyond_the_next_update_is_our_mistake():
    with pytest.raises(AssertionError, match="next weight update"):
        loader(blend(), 2).step(0, 4, until=6)


def test_workers_outlive_a_request_to_stop_that_reaches_them():
    """A signal to the process group is the rank's to answer; it needs rows until it has saved."""
    rank_loader = loader(blend(), workers=1)
    rank_loader.step(0, 2)
    (worker,) = rank_loader._iterator._workers
    for name in ("USR1", "TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    for sample in range(BATCH, STEPS * BATCH, BATCH):
        rank_loader.step(sample, 2)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    assert not worker.is_alive()


def test_a_worker_says_nothing_of_a_rank_that_goes_away_while_it_is_handed_rows(tmp_path, capfd):
    """An interrupted rank closes its connections wherever it stands, and says why itself."""

    class Offering(Dataset):
        def __getitem__(self, row):
            if not (tmp_path / "address").exists():
                read, _ = os.pipe()
                (tmp_path / "address").write_text(reduction.DupFd(read)._id[0])
            return {"tokens": np.array([row])}

    blended = blend_of((8,), (1,), 8)
    rank_loader = BlendLoader(
        blended, [Offering()], micro_batch_size=2, dp_rank=0, dp_size=1, num_workers=1, pin_memory=False
    )
    rank_loader.step(0, 1)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as rank:
            rank.connect((tmp_path / "address").read_text())
    assert len(rank_loader.step(2, 3)) == 3, "the same connection hands over the next rows"
    assert capfd.readouterr().err == ""


ROWS_OF_SEGMENTS = ([0, 0, 1, 2, 2, -1], [0, 0, 0, 0, 0, 0], [-1] * 6, [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("rows", [ROWS_OF_SEGMENTS[:1], ROWS_OF_SEGMENTS[1:3], ROWS_OF_SEGMENTS])
def test_borders_of_segments_have_one_length_whatever_the_rows_hold(rows):
    most = 7
    expected = [
        row * 6 + s for row, ids in enumerate(rows) for s in range(6) if s == 0 or ids[s] != ids[s - 1]
    ]
    batch = collate([{"segment_ids": np.array(row)} for row in rows], most)
    borders = batch["cu_seqlens"]
    assert borders.dtype == torch.int32 and len(borders) == len(rows) * most + 1
    assert borders[: len(expected)].tolist() == expected
    assert (borders[len(expected) :] == 6 * len(rows)).all()
    assert "cu_seqlens" not in collate([{"segment_ids": np.array(row)} for row in rows])


def test_rows_as_full_as_they_can_be_have_their_borders_and_fuller_ones_none():
    full_BS = torch.arange(6)[None].expand(2, 6)
    assert segment_borders(full_BS, 6).tolist() == list(range(13))
    with pytest.raises(AssertionError, match="more segments"):
        segment_borders(full_BS, 5)
