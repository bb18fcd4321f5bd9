"""What runs put on record is what they drew: in every layout, resumed, with other batches, other sources."""

import math

import numpy as np
import pytest
import yaml

from megatron_dynmix.verify.verify import verify
from tests.distributed import fault_programs, programs
from tests.distributed.conftest import quick_or_slow
from tests.distributed.ranks import run_ranks

EP1 = ["--expert-model-parallel-size", "1"]
FIXED = ["--strategy", "fixed", "--lr-decay-style", "constant"]


def digests(result):
    return [line["digest"] for line in result["ledger"] if line["kind"] == "samples"]


def digest_of_all(result):
    """Of all samples of a run, however the log intervals fell."""
    return sum(int(digest, 16) for digest in digests(result)) % 2**64


def stages(result):
    return [(line["why"], line["start_sample"]) for line in result["ledger"] if line["kind"] == "stage"]


@pytest.fixture(scope="module")
def plain(run_yaml, start_from, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain")
    return run_ranks(2, programs.train, run_yaml, start_from, run_dir)[0], run_dir


def test_I4_a_run_is_proven_by_what_it_wrote(plain):
    result, run_dir = plain
    verdict = verify(run_dir)
    assert verdict.failure is None and not verdict.notes
    assert (verdict.samples, verdict.updates) == (32, 2)
    assert sum(tally.drawn for tally in verdict.tallies) == 32
    assert stages(result) == [("start", 0), ("update", 16), ("update", 32)]


LAYOUTS = {
    "1 rank": (1, EP1),
    "EP2 x DP2": (4, ["--micro-batch-size", "1"]),
    "TP2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel", *EP1]),
    "PP3": (3, ["--pipeline-model-parallel-size", "3", *EP1]),
}


@pytest.mark.parametrize("name", quick_or_slow(LAYOUTS, {"EP2 x DP2", "PP3"}))
def test_I3_the_digests_do_not_depend_on_the_layout(name, plain, run_yaml, start_from, tmp_path):
    world_size, layout = LAYOUTS[name]
    flags = [*start_from, *layout]
    fixed = run_ranks(world_size, programs.train, run_yaml, [*flags, *FIXED], tmp_path / "fixed")[0]
    one = digests(plain[0])
    assert digests(fixed)[:2] == one[:2]  # up to the first update
    assert len(set(digests(fixed))) == 4
    assert verify(tmp_path / "fixed").proven


@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_I2_the_ledger_of_a_resumed_run_is_that_of_one_that_was_not_stopped(
    stop, run_yaml, start_from, tmp_path
):
    settings = [*start_from, "--log-interval", "2", "--train-iters", "6", "--save-interval", str(stop)]
    run_ranks(2, programs.train, run_yaml, settings, tmp_path / "whole")
    # Killed after it went on from the checkpoint: what was recorded since then is written again.
    broken = [*settings, "--train-iters", "5", "--lr-decay-iters", "6"]
    run_ranks(2, programs.train, run_yaml, broken, tmp_path / "parts")
    (tmp_path / "parts/checkpoints/latest_checkpointed_iteration.txt").write_text(str(stop))
    run_ranks(2, programs.train, run_yaml, settings, tmp_path / "parts", resume="must")
    whole, parts = ((tmp_path / name / "ledger.jsonl").read_bytes() for name in ("whole", "parts"))
    assert parts == whole
    assert verify(tmp_path / "parts").proven


GROWTHS = {
    "ramp": ["--rampup-batch-size", "4", "4", "16"],
    "steps": ["--step-batch-size-schedule", "0:4 2048:8"],  # in tokens: 16 rows of 128
}


@pytest.mark.parametrize("name", quick_or_slow(GROWTHS, {"steps"}))
def test_I3_a_batch_that_grows_draws_the_same_samples(name, run_yaml, start_from, tmp_path):
    """Four steps of 4, then two of 8, are four steps of 8."""
    even = run_ranks(2, programs.train, run_yaml, [*start_from, *FIXED], tmp_path / "even")[0]
    ramp = [*start_from, *FIXED, *GROWTHS[name], "--train-iters", "6"]
    grown = run_ranks(2, programs.train, run_yaml, ramp, tmp_path / "grown")[0]
    assert [r["global_batch_size"] for r in grown["metrics"]] == [4, 4, 4, 4, 8, 8]
    assert [r["consumed_samples"] for r in grown["metrics"]] == [4, 8, 12, 16, 24, 32]
    assert digest_of_all(grown) == digest_of_all(even)
    assert grown["metrics"][-1]["tokens"] == even["metrics"][-1]["tokens"]
    shares = [r["useful_token_share"] for r in grown["metrics"]]
    assert all(0.5 < share <= 1 for share in shares)
    assert verify(tmp_path / "grown").proven


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWTHS)
def test_I2_a_ramped_run_resumes_bit_for_bit(name, run_yaml, start_from, tmp_path):
    settings = [
        *(*start_from, *GROWTHS[name], "--signal", "train", "--interval", "3", "--train-iters", "7"),
        *("--lr-warmup-iters", "2", "--num-workers", "1"),
    ]
    whole = run_ranks(2, programs.train, run_yaml, settings, tmp_path / "whole")[0]
    first = [*settings, "--train-iters", "2", "--lr-decay-iters", "7"]
    run_ranks(2, programs.train, run_yaml, first, tmp_path / "parts")
    parts = run_ranks(2, programs.train, run_yaml, settings, tmp_path / "parts", resume="must")[0]
    for name in ("lm_loss", "lr", "grad_norm", "tokens", "consumed_samples"):
        assert [r[name] for r in parts["metrics"]] == [r[name] for r in whole["metrics"]], name
    assert parts["ledger"] == whole["ledger"]
    for name, router in whole["routers"].items():
        assert np.array_equal(router, parts["routers"][name]), name
    rates = [record["lr"] for record in whole["metrics"]]
    assert rates[1] == max(rates) == 1e-2 and rates[0] == 0.5e-2  # warmed up after two steps of 4
    assert rates[-1] == 0
    assert stages(whole) == [("start", 0), ("update", 12), ("update", 32)]
    assert verify(tmp_path / "parts").proven


def test_I3_a_run_may_go_on_with_another_batch_size(run_yaml, start_from, tmp_path):
    even = run_ranks(2, programs.train, run_yaml, [*start_from, *FIXED], tmp_path / "even")[0]
    first = [*start_from, *FIXED, "--train-iters", "1"]
    run_ranks(2, programs.train, run_yaml, first, tmp_path / "parts")
    other = [*start_from, *FIXED, *EP1, "--global-batch-size", "6", "--train-iters", "5"]
    other += ["--lr-decay-style", "cosine", "--min-lr", "1e-4"]
    parts = run_ranks(1, programs.train, run_yaml, other, tmp_path / "parts", resume="must")[0]
    # half a cosine over the 32 samples, however they are divided into steps
    rates = [r["lr"] for r in parts["metrics"]]
    angles = [math.pi * consumed / 32 for consumed in (14, 20, 26, 32)]
    assert rates[1:] == pytest.approx([1e-4 + 9.9e-3 * (math.cos(angle) + 1) / 2 for angle in angles])
    assert rates[-1] == 1e-4
    assert [r["consumed_samples"] for r in parts["metrics"]] == [8, 14, 20, 26, 32]
    assert digest_of_all(parts) == digest_of_all(even)
    assert verify(tmp_path / "parts").proven


@pytest.fixture
def other_yaml(run_yaml, tmp_path):
    """One source removed, one renamed, the others in another order."""
    content = yaml.safe_load(run_yaml.read_text())
    sources = content["data"]["sources"]
    names = list(sources)
    content["data"]["sources"] = {
        names[2]: sources[names[2]],
        "law": sources[names[1]],
        names[0]: sources[names[0]],
    }
    path = run_yaml.parent / f"{tmp_path.name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_other_sources_are_refused_unless_they_are_wanted(other_yaml, run_yaml, start_from, tmp_path):
    settings = [*start_from, "--signal", "train", "--interval", "3", "--log-interval", "2"]
    before = run_ranks(2, programs.train, run_yaml, settings, tmp_path)[0]
    longer = [*settings, "--train-iters", "5", "--save-interval", "9"]
    with pytest.raises(AssertionError) as refusal:
        run_ranks(2, programs.train, other_yaml, longer, tmp_path, resume="must")
    message = str(refusal.value)
    assert "was removed" in message and "law is new (it holds what" in message and "the order was" in message
    assert "--allow-source-change" in message

    run_ranks(2, programs.train, other_yaml, longer, tmp_path, resume="must", allow_source_change=True)
    # As after a kill before the next checkpoint: the change is made, and recorded, again.
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("4")
    longer = [*settings, "--train-iters", "8", "--save-interval", "7"]
    run_ranks(2, programs.train, other_yaml, longer, tmp_path, resume="must", allow_source_change=True)
    # And once more without a word: the checkpoint is of the sources that there are.
    longest = [*settings, "--train-iters", "9"]
    after = run_ranks(2, programs.train, other_yaml, longest, tmp_path, resume="must")[0]

    assert [why for why, _ in stages(after)] == ["start", "update", "sources changed", "update", "update"]
    assert after["ledger"][: len(before["ledger"])] == before["ledger"]
    changed = next(line for line in after["ledger"] if line.get("why") == "sources changed")
    assert changed["start_sample"] == 32 and changed["iteration"] == 5
    assert (
        changed["drawn"][0] > 0 and changed["drawn"][1] == 0 and sum(changed["weights"]) == pytest.approx(1)
    )
    assert list(after["metrics"][-1]["tokens"]) == changed["sources"]
    verdict = verify(tmp_path)
    assert verdict.failure is None and verdict.samples == 72
    assert "the sources changed at sample 32" in verdict.notes[0]


def test_a_run_stopped_beside_a_checkpoint_stays_provable(run_yaml, start_from, tmp_path):
    """The checkpoint of the last whole iteration is there already: its log interval must stay open."""
    flags = [*start_from, "--train-iters", "5", "--save-interval", "3", "--log-interval", "5"]
    flags += ["--interval", "9"]
    run_ranks(2, fault_programs.train_with_nan, run_yaml, flags, tmp_path, [4], 1)
    assert verify(tmp_path).proven
    result = run_ranks(2, programs.train, run_yaml, flags, tmp_path, resume="must")[0]
    assert [record["iteration"] for record in result["metrics"]] == [5]
    assert verify(tmp_path).proven
