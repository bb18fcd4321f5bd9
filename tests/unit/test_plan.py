"""`plan`: what it prints, what it refuses, and that what it proposes instead passes."""

import json
import shlex

import pytest
from config_fixtures import good_settings, write
from data_fixtures import (  # noqa: F401
    tokenizer_dir_fixture,
    tokenizer_fixture,
    varied_rows,
    write_jsonl,
)

from megatron_dynmix.cli import main
from megatron_dynmix.config.load import load_config
from megatron_dynmix.plan.layout import Layout, group_text
from megatron_dynmix.plan.text import size_text
from megatron_dynmix.training.setup import check_before_start, prepare_run
from megatron_dynmix.training.start_report import overview, written

MIXTRAL = {
    "model": {"preset": "mixtral-8x7b"},
    "parallel": {"expert_model_parallel_size": 8, "pipeline_model_parallel_size": 4},
    "training": {"train_iters": 250, "global_batch_size": 128, "bf16": True},
    "mixing": {"strategy": "gate-load", "signal": "probe", "probe_tokens": 5000, "interval": 100},
}


@pytest.fixture
def elsewhere(tmp_path):
    """A RUN.yaml whose tokenizer and data are on another machine."""

    def make(**sections):
        settings = good_settings(tmp_path)
        for name, section in {**MIXTRAL, **sections}.items():
            settings[name] = section
        settings["data"] = {
            **{"tokenizer": "/models/mixtral", "seq_length": 4096},
            "sources": {name: {"path": f"/data/{name}", "probe": f"/data/{name}.dev"} for name in "abc"},
        }
        return write(tmp_path, settings)

    return make


def planned(capsys, path, *flags):
    assert main(["plan", str(path), "--json", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, path, *flags):
    assert main(["plan", str(path), *map(str, flags)]) == 2
    return capsys.readouterr().err


def test_a_run_is_planned_without_its_files_and_its_gpus(elsewhere, capsys):
    plan = planned(capsys, elsewhere(), "--world-size", 64)
    assert plan["parameters"] == 46_702_792_704
    assert plan["layout"]["dp"] == 16 and plan["layout"]["expert_dp"] == 2
    assert plan["micro_batches"] == 8
    assert plan["bubble_share"] == pytest.approx(3 / 11)
    assert plan["tokens_per_iteration"] == 128 * 4096
    assert plan["updates"] == 2
    assert plan["probe_tokens"] == 3 * 2 * 4096
    assert plan["mixing_compute_share"] == pytest.approx(2 * 6 / (2 * 6 + 3 * 250 * 128))
    assert plan["count_bytes"] == 8 * 2 * 32 * 3 * 8
    assert plan["checkpoint_bytes"] == 14 * 46_702_792_704
    assert [stage["layers"] for stage in plan["memory"]] == [8] * 4
    assert all("not on this machine" in source for source in plan["sources"].values())
    assert "/models/mixtral" in plan["not_checked"][0]


def test_the_text_names_the_largest_stage_and_the_groups(elsewhere, capsys):
    assert main(["plan", str(elsewhere()), "--world-size", "64", "--bias-activation-fusion"]) == 0
    text = capsys.readouterr().out
    assert "0 (largest)" in text
    assert "EP             8 ranks       8 x  0-7; 8-15; ..." in text
    assert "PP             4 ranks      16 x  0, 16, .. 48; 1, 17, .. 49; ..." in text
    assert "a: rows and epochs unknown until prepared" in text
    assert "pipeline stages wait 27.3% of it" in text


def test_groups_are_those_of_megatron_core():
    layout = Layout(world_size=16, tp=2, pp=2, cp=2, ep=4, etp=1, virtual=1)
    groups = dict(layout.groups())
    assert groups["TP"][:2] == [[0, 1], [2, 3]]
    assert groups["CP"][:2] == [[0, 2], [1, 3]]
    assert groups["DP"][0] == [0, 4] and groups["PP"][0] == [0, 8]
    assert groups["EP"][0] == [0, 1, 2, 3] and groups["expert DP"][0] == [0, 4]
    assert group_text([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]) == "0-3; 4-7; ..."
    assert group_text([[0, 4]]) == "0, 4"


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--world-size", 24], "24 ranks cannot hold expert TP x EP x PP = 32"),
        (
            ["--world-size", 48, "--pipeline-model-parallel-size", 3],
            "pipeline_model_parallel_size 3 does not",
        ),
        (
            ["--world-size", 64, "--expert-model-parallel-size", 3],
            "expert_model_parallel_size 3 does not divide",
        ),
        (["--world-size", 64, "--global-batch-size", 100], "is not a multiple of micro_batch_size 1 x"),
        (["--world-size", 64, "--tensor-model-parallel-size", 2], "without sequence_parallel"),
        (["--world-size", 0], "--world-size is 0; it must be 1 or more"),
        (
            ["--world-size", 64, "--gpu-memory-gb", -1],
            "--gpu-memory-gb is -1.0; it must be a positive number",
        ),
        (
            ["--world-size", 64, "--host", "cpu", "--gpu-memory-gb", 80],
            "--gpu-memory-gb is 80, but the ranks are planned on CPUs",
        ),
        (["--world-size", 64, "--moe-router-topk", 9], "moe_router_topk is 9, but there are 8 experts"),
        (["--world-size", 64, "--weight-floor", 0.5], "floor"),
    ],
)
def test_what_cannot_run_is_refused_by_the_rule_of_train(flags, rule, elsewhere, capsys):
    assert rule in refused(capsys, elsewhere(), *flags)


def proposals_of(message):
    return [line.split("  (")[0].split() for line in message.splitlines() if line.startswith("  --")]


@pytest.mark.parametrize(
    "flags",
    [
        ["--world-size", 64, "--pipeline-model-parallel-size", 3],
        ["--world-size", 8, "--pipeline-model-parallel-size", 1, "--gpu-memory-gb", 125],
        ["--world-size", 64, "--gpu-memory-gb", 60],
    ],
)
def test_what_is_proposed_passes_and_fits(flags, elsewhere, capsys):
    path = elsewhere()
    proposals = proposals_of(refused(capsys, path, *flags))
    assert proposals
    for proposal in proposals:
        assert main(["plan", str(path), *map(str, flags), *proposal]) == 0, shlex.join(proposal)


def test_a_model_that_cannot_be_sized_is_refused_for_its_layout_first(elsewhere, capsys):
    flags = ["--attention-output-gate", "--world-size", 64, "--expert-model-parallel-size"]
    assert "expert_model_parallel_size 3 does not divide" in refused(capsys, elsewhere(), *flags, 3)
    assert "attention_output_gate is True: the parameters of such" in refused(capsys, elsewhere(), *flags, 8)


def test_other_numbers_of_ranks_are_named(elsewhere, capsys):
    assert "this layout can run on 32 or 64 ranks" in refused(capsys, elsewhere(), "--world-size", 40)


def test_weights_that_are_elsewhere_are_said_not_to_be_checked(elsewhere, capsys):
    model = {"preset": "mixtral-8x7b", "load_hf": "/models/mixtral"}
    checkpoint = {"pretrained_checkpoint": "/runs/before"}
    plan = planned(capsys, elsewhere(model=model, checkpoint=checkpoint), "--world-size", 64)
    text = " ".join(plan["not_checked"])
    assert "model.load_hf is /models/mixtral" in text and "/runs/before" in text


def test_a_strategy_whose_files_are_elsewhere_is_not_checked(elsewhere, capsys):
    mixing = {"strategy": "ref-loss", "reference": "/runs/reference.json"}
    plan = planned(capsys, elsewhere(mixing=mixing), "--world-size", 64)
    assert any("mixing.reference is /runs/reference.json" in note for note in plan["not_checked"])


def test_where_nothing_fits_it_says_so(elsewhere, capsys):
    message = refused(capsys, elsewhere(), "--world-size", 32, "--gpu-memory-gb", 8)
    assert "no layout of 32 ranks fits" in message


@pytest.fixture
def local_run(tmp_path, tokenizer_dir):
    """Three sources and a tokenizer that are here."""
    settings = good_settings(tmp_path)
    settings["data"] |= {"tokenizer": str(tokenizer_dir), "template": "vicuna", "overlong": "truncate"}
    settings["model"]["num_layers"] = 4
    for seed, name in enumerate(settings["data"]["sources"]):
        write_jsonl(tmp_path / f"{name}.jsonl", varied_rows(30 + 10 * seed, seed))
        write_jsonl(tmp_path / f"{name}.probe.jsonl", varied_rows(8, 10 + seed))
    return write(tmp_path, settings)


def test_sources_are_unknown_until_prepared_and_counted_then(local_run, capsys):
    plan = planned(capsys, local_run, "--world-size", 2)
    assert all("not prepared" in source or "prepare" in source for source in plan["sources"].values())
    assert main(["prepare", str(local_run), "--workers", "1"]) == 0
    capsys.readouterr()
    plan = planned(capsys, local_run, "--world-size", 2)
    assert list(plan["sources"]) == ["chat", "math", "code"]
    for source in plan["sources"].values():
        assert source["tokens_per_epoch"] == source["rows"] * 64
        assert source["epochs"] == pytest.approx(plan["run_rows"] / 3 / source["rows"])
    assert plan["run_rows"] == 20 * 8 and plan["not_checked"] == []


def test_a_run_begins_with_the_numbers_of_its_plan(local_run, tmp_path, capsys):
    config = load_config(local_run, ["--train-iters", "20", "--save-interval", "5"])
    prepared = prepare_run(check_before_start(config))
    capsys.readouterr()
    text = overview(prepared, 2)
    plan = planned(capsys, local_run, "--world-size", 2)
    assert "layout   2 ranks = TP 1 x CP 1 x DP 2 x PP 1; experts: ETP 1 x EP 2" in text
    for name, source in plan["sources"].items():
        (line,) = [line.split() for line in text.splitlines() if line.startswith(name)]
        assert line[1] == str(source["rows"]) and line[-1] == f"{source['epochs']:.2f}"
    assert f"a rank needs about {size_text(plan['memory'][0]['total'])} of main memory" in text
    places = written(config)
    assert "every 5 iterations and at the end" in places and str(tmp_path / "prepared") in places
