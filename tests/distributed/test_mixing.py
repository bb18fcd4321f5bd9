"""What decides the weights of real runs: losses, operators, caps, plans. EP2, a few iterations each."""

import json

import numpy as np
import pytest
import yaml

from megatron_dynmix.checkpoint.run_state import read_run_state
from megatron_dynmix.verify.verify import verify
from tests.distributed import programs
from tests.distributed.ranks import run_ranks

TRAIN = ["--signal", "train", "--interval", "2"]
CLOCK = ("seconds",)


def without_clock(records):
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in records]


def proven(run_dir):
    verdict = verify(run_dir)
    assert verdict.failure is None, verdict.failure
    return verdict


def test_I2_a_loss_strategy_resumes_inside_an_interval_bit_for_bit(run_yaml, start_from, tmp_path):
    flags = [
        *(*start_from, "--strategy", "odm", "--signal", "train", "--interval", "3", "--train-iters", "7"),
        *("--shadow", "[ado, {strategy: gate-load, layers: all}]", "--max-kl-step", "0.05"),
    ]
    whole = run_ranks(2, programs.train, run_yaml, flags, tmp_path / "whole")[0]
    first = [*flags, "--train-iters", "5", "--lr-decay-iters", "7"]
    run_ranks(2, programs.train, run_yaml, first, tmp_path / "parts")
    parts = run_ranks(2, programs.train, run_yaml, flags, tmp_path / "parts", resume="must")[0]
    # the first part was told of fewer iterations and rows, and that is on record
    assert without_clock(parts["mixing"])[1]["loss"] == without_clock(whole["mixing"])[1]["loss"]
    for key in ("new_weights", "loss", "shadow", "load", "events", "notes", "rows"):
        assert [r[key] for r in parts["mixing"]] == [r[key] for r in whole["mixing"]], key
    assert [r["lm_loss"] for r in parts["metrics"]] == [r["lm_loss"] for r in whole["metrics"]]
    assert parts["blend"] == whole["blend"]
    weights = [record["new_weights"] for record in whole["mixing"]]
    assert weights[0] != weights[1]
    for record in whole["mixing"]:
        assert record["kl_step"] <= 0.05 + 1e-12
        assert list(record["shadow"]) == ["ado", "gate-load:layers=all"]
        assert record["signal"]["num_layers"] == 3
    assert proven(tmp_path / "parts").updates == 2


def test_an_operator_pauses_a_source_and_the_run_is_proven(run_yaml, start_from, tmp_path):
    sources = list(yaml.safe_load(run_yaml.read_text())["data"]["sources"])
    override = tmp_path / "override.json"
    flags = [*start_from, "--strategy", "fixed", "--interval", "2", "--override-file", str(override)]
    override.write_text(json.dumps({"pause": [sources[1]]}))
    run_ranks(2, programs.train, run_yaml, flags, tmp_path / "run")
    override.write_text('{"pause": ["nobody"]}')
    longer = [*flags, "--train-iters", "6", "--lr-decay-style", "constant"]
    run_ranks(2, programs.train, run_yaml, longer, tmp_path / "run", resume="must")
    override.unlink()
    longest = [*longer, "--train-iters", "10"]
    result = run_ranks(2, programs.train, run_yaml, longest, tmp_path / "run", resume="must")[0]
    records = {record["iteration"]: record for record in result["mixing"]}
    assert list(records) == [2, 4, 6, 8], "a fixed mix without an override needs no update"
    even, paused = 1 / len(sources), records[2]["new_weights"]
    assert paused[1] == 0 and paused[0] == pytest.approx(1 / (len(sources) - 1))
    assert records[4]["rows"][1] == records[8]["rows"][1] == records[2]["rows"][1]
    assert records[2]["events"] == [{"kind": "override", "text": f"override: {sources[1]} paused"}]
    [note] = records[6]["notes"]
    assert note["kind"] == "override_unusable" and "nobody" in note["text"]
    assert records[6]["new_weights"] == paused
    assert records[8]["new_weights"] == pytest.approx([even] * len(sources))
    assert proven(tmp_path / "run").updates == 4


@pytest.fixture
def capped_yaml(run_yaml, tmp_path):
    """The first source may be drawn for one row in a hundred only."""
    content = yaml.safe_load(run_yaml.read_text())
    next(iter(content["data"]["sources"].values()))["max_epochs"] = 0.01
    path = run_yaml.parent / f"{tmp_path.name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_source_is_not_drawn_beyond_its_epochs(capped_yaml, start_from, tmp_path):
    flags = [*start_from, "--strategy", "fixed", "--interval", "2", "--train-iters", "12"]
    result = run_ranks(2, programs.train, capped_yaml, flags, tmp_path / "run")[0]
    size = result["blend"]["sizes"][0]
    cap = int(0.01 * size)
    drawn = [record["rows"][0] for record in result["mixing"]]
    weights = np.array([record["new_weights"] for record in result["mixing"]])
    assert 0 < cap < 12 * 8 / len(result["blend"]["sizes"]), "the cap must bite"
    assert max(drawn) <= cap and drawn[-1] == drawn[-2]
    assert weights[-1][0] < 1 / 12 and weights[-1][1:] == pytest.approx(weights[-1][1])
    assert any(event["kind"] == "max_epochs" for record in result["mixing"] for event in record["events"])
    proven(tmp_path / "run")


def test_a_pause_that_the_caps_do_not_allow_is_not_followed_and_ends_no_run(
    capped_yaml, start_from, tmp_path
):
    sources = list(yaml.safe_load(capped_yaml.read_text())["data"]["sources"])
    override = tmp_path / "override.json"
    override.write_text(json.dumps({"pause": sources[1:]}))
    flags = [*start_from, "--strategy", "fixed", "--interval", "2", "--override-file", str(override)]
    result = run_ranks(2, programs.train, capped_yaml, flags, tmp_path / "run")[0]
    for record in result["mixing"]:
        assert record["override"] is None and min(record["new_weights"][1:]) > 0
        [note] = [note for note in record["notes"] if note["kind"] == "override_not_followed"]
        assert "max_epochs leaves" in note["text"]
    assert proven(tmp_path / "run").updates == len(result["mixing"]) > 0


def test_a_plan_decides_the_first_weights_too(run_yaml, start_from, tmp_path):
    sources = list(yaml.safe_load(run_yaml.read_text())["data"]["sources"])
    first = {name: float(n + 1) for n, name in enumerate(sources)}
    plan = json.dumps([[0, first], [2, dict.fromkeys(sources, 1)]])
    flags = [*start_from, "--strategy", "schedule", "--schedule", plan]
    result = run_ranks(2, programs.train, run_yaml, flags, tmp_path / "run")[0]
    total = sum(first.values())
    assert result["ledger"][0]["weights"] == pytest.approx([share / total for share in first.values()])
    assert result["mixing"][0]["new_weights"] == pytest.approx([1 / len(sources)] * len(sources))
    proven(tmp_path / "run")


def test_a_rule_that_fails_keeps_the_last_weights_and_stops(run_yaml, start_from, tmp_path):
    flags = [*start_from, *TRAIN, "--save-interval", "1", "--strategy", f"{__name__}:broken_rule"]
    message = run_ranks(2, programs.train_until_stopped, run_yaml, flags, tmp_path)[0]
    assert "the weights could not be updated after iteration 2" in message and "sum to" in message
    assert "iter_0000002, and --resume goes on from it" in message and "learning rate" not in message
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"
    mix = read_run_state(tmp_path / "checkpoints/iter_0000002").mix
    tokens_D = mix.interval_stats.tokens_D.numpy()
    counted_D = mix.interval_counts.sum(axis=(0, 2, 3))
    layers, topk = mix.interval_counts.shape[2], 2
    assert (tokens_D > 0).all(), "the next update reads what this one could not use"
    np.testing.assert_array_equal(counted_D, tokens_D * layers * topk)


def broken_rule(weights_D, signal):
    """Forgets to normalise."""
    return 2 * weights_D
