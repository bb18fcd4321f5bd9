"""Checkpoints: any layout goes on from any other's, and nothing that happens to one costs another."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest

from megatron_dynmix.checkpoint.folder import (
    CHECKSUMS,
    RestorePoint,
    checksum,
    checksums_text,
    newest_good,
    read_checksums,
)
from megatron_dynmix.checkpoint.run_state import FORMAT_VERSION, read_run_state
from tests.checkpoint_tensors import assert_equal_tensors, tensors_of
from tests.distributed import checkpoint_programs as programs
from tests.distributed import fault_programs
from tests.distributed.conftest import SMALL, quick_or_slow
from tests.distributed.layouts import CP2, ETP1, PP2, TP2, VPP2, ep
from tests.distributed.ranks import run_ranks

WHOLE, STOP, INTERVAL = 6, 4, 3
LENGTH = ["--train-iters", str(WHOLE), "--interval", str(INTERVAL), "--signal", "train"]
FLAGS = [*SMALL, "--num-layers", "4", "--lr", "1e-3", *LENGTH]
FIRST = [*FLAGS, "--train-iters", str(STOP), "--lr-decay-iters", str(WHOLE)]
BF16 = ["--bf16"]
PLAIN = ["--no-use-distributed-optimizer"]

SAVED = {
    "EP2": (2, ep(2)),
    "EP2, plain": (2, [*ep(2), *PLAIN]),
    "EP2, bf16": (2, [*ep(2), *BF16]),
    "EP2, bf16, plain": (2, [*ep(2), *BF16, *PLAIN]),
    "EP4": (4, ep(4)),
    "TP2, ETP1": (2, [*TP2, *ETP1, *ep(1)]),
    "TP2 x PP2": (4, [*TP2, *PP2, *ep(1)]),
    "PP2 VPP2 x EP2": (4, [*VPP2, *ep(2)]),
}
"""Runs that stop in the middle of an interval: ranks, flags."""

RESUMED = {
    ("EP2", "1 rank"): (1, ep(1)),
    ("EP2", "EP4"): (4, ep(4)),
    ("EP2", "EP2 x DP2"): (4, ep(2)),
    ("EP2", "TP2 x EP2"): (4, [*TP2, *ETP1, *ep(2)]),
    ("EP2", "TP2, ETP1"): (2, [*TP2, *ETP1, *ep(1)]),
    ("EP2", "TP2, ETP1, plain"): (2, [*TP2, *ETP1, *ep(1), *PLAIN]),
    ("TP2, ETP1", "EP2"): (2, ep(2)),
    ("EP2", "TP2 x EP2, ETP2"): (4, [*TP2, *ep(2)]),
    ("EP2", "PP2 x EP2"): (4, [*PP2, *ep(2)]),
    ("EP2", "PP2 VPP2 x EP2"): (4, [*VPP2, *ep(2)]),
    ("EP2", "CP2 x EP2"): (2, [*CP2, *ep(2)]),
    ("EP2", "EP2, plain"): (2, [*ep(2), *PLAIN]),
    ("EP2", "1 rank, plain"): (1, [*ep(1), *PLAIN]),
    ("EP2, plain", "EP2"): (2, ep(2)),
    ("EP2, plain", "1 rank, plain"): (1, [*ep(1), *PLAIN]),
    ("EP2, plain", "TP2 x EP2, plain"): (4, [*TP2, *ETP1, *ep(2), *PLAIN]),
    ("EP2, bf16", "1 rank, bf16"): (1, [*ep(1), *BF16]),
    ("EP2, bf16", "EP2, bf16, plain"): (2, [*ep(2), *BF16, *PLAIN]),
    ("EP2, bf16", "EP4, bf16"): (4, [*ep(4), *BF16]),
    ("EP2, bf16, plain", "1 rank, bf16"): (1, [*ep(1), *BF16]),
    ("EP4", "1 rank"): (1, ep(1)),
    ("TP2 x PP2", "1 rank"): (1, ep(1)),
    ("PP2 VPP2 x EP2", "1 rank"): (1, ep(1)),
    ("PP2 VPP2 x EP2", "EP2"): (2, ep(2)),
}
"""Checkpoint and layout that goes on from it: ranks, flags."""

QUICK = {
    *(("EP2", "1 rank"), ("EP2", "EP2 x DP2"), ("EP2", "TP2 x EP2"), ("EP2", "PP2 VPP2 x EP2")),
    ("EP2", "EP2, plain"),
}
"""The others are slow tests."""


@pytest.fixture(scope="module")
def start(run_yaml, tmp_path_factory):
    """Flags that begin with the same weights in every layout."""
    folder = tmp_path_factory.mktemp("initial")
    run_ranks(1, programs.save_initial_weights, run_yaml, [*FLAGS, *ep(1)], folder)
    return ["--pretrained-checkpoint", str(folder / "checkpoints")]


@pytest.fixture(scope="module")
def undisturbed(run_yaml, start, tmp_path_factory):
    """Precision -> a run at EP2 that was never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    kinds = {"fp32": [], "bf16": BF16}
    runs = [([*FLAGS, *start, *ep(2), *flags], folder / kind, "no") for kind, flags in kinds.items()]
    return dict(zip(kinds, run_ranks(2, programs.runs_in_turn, run_yaml, runs)[0], strict=True))


@pytest.fixture(scope="module")
def resumed(request, run_yaml, start, tmp_path_factory):
    """(checkpoint, layout) -> the run that went on; one job per number of ranks, and no pair unasked for."""
    folder = tmp_path_factory.mktemp("elastic")
    chosen = {item.callspec.params.get("pair") for item in request.session.items if hasattr(item, "callspec")}
    saved_ones = {pair[0] for pair in chosen & set(RESUMED)}
    for world_size in (2, 4):
        runs = [
            ([*FIRST, *start, *flags], folder / name, "no")
            for name, (ranks, flags) in SAVED.items()
            if ranks == world_size and name in saved_ones
        ]
        run_ranks(world_size, programs.runs_in_turn, run_yaml, runs)
    answers = {}
    for world_size in (1, 2, 4):
        pairs = {
            pair: flags for pair, (ranks, flags) in RESUMED.items() if ranks == world_size and pair in chosen
        }
        runs = []
        for saved, layout in pairs:
            copy = shutil.copytree(folder / saved, folder / f"{saved} to {layout}")
            runs.append(([*FLAGS, *start, *pairs[saved, layout]], copy, "must"))
        answers |= zip(pairs, run_ranks(world_size, programs.runs_in_turn, run_yaml, runs)[0], strict=True)
    return answers


@pytest.mark.newest
@pytest.mark.parametrize("pair", quick_or_slow(RESUMED, QUICK))
def test_I2_I3_a_run_goes_on_in_another_layout_as_if_undisturbed(pair, resumed, undisturbed):
    half = "bf16" in pair[0]
    mine, whole = resumed[pair], undisturbed["bf16" if half else "fp32"]
    assert mine["tokens"] == whole["tokens"]
    assert mine["rows"] == whole["rows"]
    np.testing.assert_allclose(mine["losses"], whole["losses"], rtol=4e-3 if half else 1e-4)
    if not half:  # which may move a token to another expert
        for key in ("loads", "weights", "blend"):
            assert mine[key] == whole[key], key


SHORT = [*SMALL, "--interval", "9", "--strategy", "uniform", "--train-iters", "4", "--save-interval", "1"]
"""Four iterations, a checkpoint after each."""
CONTINUE, ASYNC = ["--on-save-error", "continue"], ["--async-save"]
FAILURES = {
    "common.pt": ([], "common.pt", 0, 2),
    "shard of another rank": ([], "shard", 1, 2),
    "shard of another rank, async": (ASYNC, "shard", 1, 2),
    ".metadata": ([], ".metadata", 0, 2),
    ".metadata, async": (ASYNC, ".metadata", 0, 2),
    "run state": ([], "run_state.json", 0, 2),
    "writer is killed": ([], "killed", 1, 2),
    "writer is killed, async": (ASYNC, "killed", 1, 2),
    "writer cannot be started, async": ([*CONTINUE, *ASYNC], "fork", 1, 2),
    "records, continue": (CONTINUE, "records", 0, 2),
    "first checkpoint": ([], "shard", 1, 1),
    "continue": (CONTINUE, "shard", 1, 2),
    "continue, async": ([*CONTINUE, *ASYNC], "shard", 1, 2),
    "continue, last": (CONTINUE, "shard", 0, 4),
    "continue, last, async": ([*CONTINUE, *ASYNC], "common.pt", 0, 4),
}
"""What cannot be written: flags, file, rank, iteration."""


QUICK_FAILURES = {
    *("common.pt", "shard of another rank, async", ".metadata", "run state", "writer is killed, async"),
    *("writer cannot be started, async", "records, continue", "first checkpoint", "continue"),
    "continue, last, async",
}


@pytest.fixture(scope="module")
def failed(request, run_yaml, tmp_path_factory):
    """Case -> folder of the run, what each rank said and how it ended; no case unasked for."""
    folder = tmp_path_factory.mktemp("failures")
    chosen = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    names = [name for name in FAILURES if name in chosen]
    cases = [([*SHORT, *FAILURES[name][0]], folder / name, *FAILURES[name][1:]) for name in names]
    ranks = run_ranks(2, programs.failures, run_yaml, cases)
    return {name: (folder / name, [rank[i] for rank in ranks]) for i, name in enumerate(names)}


def saved_in(run_dir):
    """Names in the checkpoints folder: what is whole, and leftovers if there are any."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


WHY = {"killed": "results_queue should not be empty"}


@pytest.mark.newest
@pytest.mark.parametrize("case", quick_or_slow(FAILURES, QUICK_FAILURES))
def test_a_checkpoint_that_cannot_be_written_costs_no_older_one(case, failed):
    flags, what, rank, iteration = FAILURES[case]
    run_dir, ranks = failed[case]
    (said, end), (_, other_end) = ranks
    told = [line for line in [*said, end or ""] if "could not be written" in line]
    assert len(told) == 1
    assert f"the checkpoint of iteration {iteration} could not be written: rank {rank}: " in told[0]
    assert WHY.get(what, "No space left on device") in told[0]
    before = (
        "No checkpoint was written before" if iteration == 1 else f"good one is {run_dir}/checkpoints/iter_"
    )
    assert before in told[0]
    goes_on = "continue" in flags and iteration < 4
    whole = [n for n in range(1, 5) if n != iteration and (n < iteration or goes_on)]
    folders = [f"iter_{n:07d}" for n in whole]
    assert saved_in(run_dir) == [*folders, *(["latest_checkpointed_iteration.txt"] if whole else [])]
    if whole:
        assert newest_good(run_dir / "checkpoints") == RestorePoint(run_dir / "checkpoints" / folders[-1])
    if goes_on:
        assert end is None and other_end is None
    else:
        assert end.startswith("TrainingStopped: ") and "Make room" in end
        assert other_end == "TrainingStopped: "  # one message is enough


NAN = ["--lr", "1e30", "--lr-warmup-iters", "1"]
"""The second step is enormous, so that the third brings a loss that is no number."""


@pytest.fixture(scope="module")
def sync(run_yaml, tmp_path_factory):
    """Folder with runs that were written while training waited; what rank 0 of each said."""
    folder = tmp_path_factory.mktemp("sync")
    kinds = {"all": [], "keep 2": ["--keep-last", "2"], "keep 1, broken": [*NAN, "--keep-last", "1"]}
    runs = [([*SHORT, *flags], folder / kind, "no") for kind, flags in kinds.items()]
    said = run_ranks(2, programs.outcomes, run_yaml, runs)[0]
    return folder, dict(zip(kinds, said, strict=True))


def folders(*iterations):
    return [*(f"iter_{n:07d}" for n in iterations), "latest_checkpointed_iteration.txt"]


def test_only_the_last_checkpoints_are_kept(sync):
    folder, said = sync
    assert said["all"][1] is None and said["keep 2"][1] is None
    assert saved_in(folder / "all") == folders(1, 2, 3, 4)
    assert saved_in(folder / "keep 2") == folders(3, 4)


def test_the_last_good_checkpoint_is_kept_when_the_run_breaks(sync):
    """One is to be kept, and the state of iteration 2 is broken: the one before it may not go."""
    folder, said = sync
    assert "trained well is" in said["keep 1, broken"][1]
    assert saved_in(folder / "keep 1, broken") == folders(1, 2)
    point = newest_good(folder / "keep 1, broken/checkpoints")
    assert point.source.name == "iter_0000001" and not point.notes


@pytest.mark.newest
def test_a_checkpoint_written_beside_the_training_is_the_state_it_was_asked_for(sync, run_yaml, tmp_path):
    flags = [*SHORT, "--save-interval", "2", "--async-save"]
    said, end = run_ranks(2, programs.written_late, run_yaml, flags, tmp_path)[0]
    assert end is None
    lines = [line for line in said if " iteration  " in line or "checkpoint" in line]
    order = [next(i for i, line in enumerate(lines) if text in line) for text in (
        "saving checkpoint at iteration       2",
        " iteration        3/",
        "successfully saved checkpoint from iteration       2",
        "saving checkpoint at iteration       4",
        "successfully saved checkpoint from iteration       4",
    )]  # fmt: skip
    assert order == sorted(order)
    for iteration in (2, 4):
        mine, whole = (folder / f"checkpoints/iter_{iteration:07d}" for folder in (tmp_path, sync[0] / "all"))
        assert_equal_tensors(tensors_of(mine), tensors_of(whole))
        # what was known to be good at that moment depends on what was saved before
        states = [replace(read_run_state(folder), config={}, good=None) for folder in (mine, whole)]
        assert states[0].text() == states[1].text()


def damage(path, how):
    content = path.read_bytes()
    match how:
        case "flip":
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "remove":
            path.unlink()
        case "newer":  # by one who knows how: its checksum is right
            path.write_text(
                path.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 9')
            )
            sums = {**read_checksums(path.parent), path.name: checksum(path)}
            (path.parent / CHECKSUMS).write_text(checksums_text(sums))


BAD = {
    "flipped byte": ("__1_0.distcp", "flip", [], "__1_0.distcp: expected blake3:"),
    "missing shard": ("__0_0.distcp", "remove", [], "found no such file"),
    "truncated common.pt": ("common.pt", "cut", [], "common.pt: expected"),
    "flipped byte of common.pt": ("common.pt", "flip", [], "common.pt: expected blake3:"),
    "broken run state": ("run_state.json", "cut", [], "run_state.json: expected"),
    "newer version": ("run_state.json", "newer", [], "written by a newer version (format 9"),
    "another model": ("common.pt", None, ["--hidden-size", "64"], "holds another model: hidden_size 32"),
    "no checkpoint": (None, None, [], "holds no checkpoint"),
}
"""File, what happens to it, flags, what the refusal says."""


@pytest.fixture(scope="module")
def bad(sync, run_yaml, tmp_path_factory):
    """Case -> folder of a run with one checkpoint, and that one is bad; what each rank said."""
    folder, runs = tmp_path_factory.mktemp("bad"), []
    for name, (file, how, flags, _) in BAD.items():
        copy = shutil.copytree(sync[0] / "all", folder / name)
        for iteration in (1, 2, 3, *([] if file else [4])):
            shutil.rmtree(copy / f"checkpoints/iter_{iteration:07d}")
        if file is None:
            (copy / "checkpoints/latest_checkpointed_iteration.txt").unlink()
        elif how is not None:
            damage(copy / "checkpoints/iter_0000004" / file, how)
        runs.append(([*SHORT, *flags], copy, "must"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ranks = run_ranks(2, programs.outcomes, run_yaml, runs)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before, "nothing is written or deleted"
    return folder, {name: [rank[i] for rank in ranks] for i, name in enumerate(BAD)}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_refused_in_one_message(name, bad):
    for said, end in bad[1][name]:
        assert end is not None and end.startswith("InputError: ") and BAD[name][3] in end
        assert "\n" not in end and not any("Traceback" in line for line in said)


def cli(*arguments, **options):
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_dynmix", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def left_of(process, seconds=20):
    """Processes of a finished command's session that do not end."""
    until = time.monotonic() + seconds
    while True:
        left = []
        for other in psutil.process_iter(["status"]):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(other.pid) == process.pid and other.info["status"] != psutil.STATUS_ZOMBIE:
                    left.append(other)
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.1)


@pytest.mark.parametrize("name", quick_or_slow(["flipped byte", "missing shard"], {"flipped byte"}))
def test_the_command_refuses_a_bad_checkpoint_with_exit_code_2(name, bad, run_yaml):
    flags = ["--run-dir", bad[0] / name, "--resume", "must", *SHORT, *ep(1)]
    process = cli("train", run_yaml, *flags, stdout=subprocess.DEVNULL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = [line for line in stderr.splitlines() if "megatron-dynmix" in line]
    assert BAD[name][3] in line and "Traceback" not in stderr
    assert not left_of(process)


def test_I11_a_rank_killed_in_a_save_leaves_no_process_and_a_checkpoint_that_loads(run_yaml, tmp_path):
    flags = [*SHORT, "--train-iters", "400", *ep(1)]
    process = cli("train", run_yaml, "--run-dir", tmp_path, *flags, stdout=subprocess.DEVNULL)
    whole, half = tmp_path / "checkpoints/iter_0000002", None
    until = time.monotonic() + 120
    while half is None and process.poll() is None and time.monotonic() < until:
        half = next((tmp_path / "checkpoints").glob(".iter_*.tmp"), None) if whole.is_dir() else None
    process.kill()
    process.communicate()
    assert half is not None
    assert not left_of(process)
    assert newest_good(tmp_path / "checkpoints").source >= whole


def test_a_damaged_checkpoint_is_replaced_by_the_run_that_goes_on_before_it(sync, run_yaml, tmp_path):
    copy = shutil.copytree(sync[0] / "all", tmp_path / "run")
    newest, older = copy / "checkpoints/iter_0000004", copy / "checkpoints/iter_0000003"
    damage(newest / "__1_0.distcp", "flip")
    (said, end), (_, other_end) = run_ranks(2, programs.outcome, run_yaml, SHORT, copy, "must")
    assert end is None and other_end is None
    (line,) = [line for line in said if "is damaged" in line]
    assert line.startswith(f"{newest} is damaged: __1_0.distcp: expected blake3:")
    assert line.endswith(f"; {older} is used instead")
    assert newest_good(copy / "checkpoints") == RestorePoint(newest)
    assert saved_in(copy) == folders(1, 2, 3, 4)
    assert_equal_tensors(tensors_of(newest), tensors_of(sync[0] / "all/checkpoints/iter_0000004"))


def test_a_run_that_breaks_at_once_is_set_back_before_where_it_went_on_from(sync, run_yaml, tmp_path):
    """And when it has gone on from there, nothing of what it did before can be taken for its own."""
    copy = shutil.copytree(sync[0] / "all", tmp_path / "run")
    checkpoints = copy / "checkpoints"
    assert [read_run_state(checkpoints / name).good for name in folders(1, 2, 3, 4)[:4]] == [None, 1, 2, 3]
    longer = [*SHORT, "--train-iters", "6", "--save-interval", "6"]
    ends = run_ranks(2, fault_programs.train_with_nan, run_yaml, longer, copy, [5], 0, resume="must")
    assert f"trained well is {checkpoints}/iter_0000003, and --resume goes on from it" in ends[0][1]
    assert newest_good(checkpoints) == RestorePoint(checkpoints / "iter_0000003")
    damage(checkpoints / "iter_0000002/__1_0.distcp", "remove")  # takes no other one's place
    flags = [*longer, "--keep-last", "3", "--async-save"]
    (_, end), _ = run_ranks(2, programs.outcome, run_yaml, flags, copy, "must")
    assert end is None
    assert saved_in(copy) == folders(1, 2, 3, 6)
    assert newest_good(checkpoints) == RestorePoint(checkpoints / "iter_0000006")


def test_a_full_disk_and_a_read_only_one_lose_nothing(sync, run_yaml, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    one = sum(path.stat().st_size for path in (sync[0] / "all/checkpoints/iter_0000004").iterdir())
    command = ["mount", "-t", "tmpfs", "-o", f"size={one * 5 // 2}", "tmpfs", str(checkpoints)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        ranks = run_ranks(2, programs.on_a_small_disk, run_yaml, SHORT, tmp_path, [one * 5, None])
        (_, full), (_, enough), (_, read_only) = ranks[0]
        assert full.startswith("TrainingStopped: the checkpoint of iteration 3 could not be written: rank ")
        assert f"The last good one is {checkpoints}/iter_0000002, and --resume goes on from it" in full
        assert enough is None
        assert read_only.startswith(f"InputError: {checkpoints} cannot be written (Read-only file system)")
        assert saved_in(tmp_path) == folders(1, 2, 3, 4)
        same = [(folder / "mixing.jsonl").read_text() for folder in (tmp_path, sync[0] / "all")]
        assert same[0] == same[1]
        written, whole = (folder / "iter_0000004" for folder in (checkpoints, sync[0] / "all/checkpoints"))
        assert_equal_tensors(tensors_of(written), tensors_of(whole))
    finally:
        subprocess.run(["umount", "-l", str(checkpoints)], check=True)
