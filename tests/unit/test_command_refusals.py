"""What no rule can mix is one message and exit code 2 of every command, before anything is made."""

import json

import pytest
from config_fixtures import good_settings, write

from megatron_dynmix.cli import main
from megatron_dynmix.data.tokenizer.fast import train_bpe

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")
COMMANDS = {
    "train": lambda run_yaml, out, strategy: ["train", run_yaml, "--run-dir", out, "--strategy", strategy],
    "plan": lambda run_yaml, out, strategy: ["plan", run_yaml, "--world-size", "1", "--strategy", strategy],
    "compare": lambda run_yaml, out, strategy: [
        *("compare", run_yaml, "--output", out, "--seeds", "1", "--strategies", strategy)
    ],
    "launch": lambda run_yaml, out, strategy: [
        *("launch", "slurm", run_yaml, "--nodes", "1", "--gpus-per-node", "1", "--run-dir", out),
        *("--strategy", strategy),
    ],
}
CASES = {
    "no MoE": ("gate-load", {"model": {"num_moe_experts": None}}, "the model is dense"),
    "no MoE, corrected": (
        "uniform",
        {"model": {"num_moe_experts": None}, "mixing": {"similarity_correction": True}},
        "the model is dense",
    ),
    "one source": ("gate-load", {"sources": 1}, "gate-load with 1 source; it needs 3"),
    "two sources": ("inverse", {"sources": 2}, "inverse with 2 sources; it needs 3"),
    "no target": ("match-load", {}, "strategy match-load needs mixing.match"),
    "unknown target": ("match-load", {"mixing": {"match": "law"}}, "mixing.match is law, which is none of"),
    "no embeddings": ("sent-emb", {}, "strategy sent-emb needs mixing.embeddings"),
    "begins with what measures": ("gate-load", {"mixing": {"begin_with": "odm"}}, "has no weights before"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_mixed_is_one_message(tmp_path, capsys, command, case):
    strategy, changes, message = CASES[case]
    content = good_settings(tmp_path)
    train_bpe(["some text"], 300, tmp_path / "tokenizer")
    del content["parallel"]
    sources = content["data"]["sources"]
    content["data"]["sources"] = dict(list(sources.items())[: changes.get("sources")])
    for section in ("model", "mixing"):
        content[section] |= changes.get(section, {})
    arguments = COMMANDS[command](str(write(tmp_path, content)), str(tmp_path / "out"), strategy)
    assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-dynmix")]
    assert len(said) == 1 and message in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "loads, flags, message",
    [
        ({"chat": [1, 2]}, ["--strategy", "gate-load"], "at least 3 sources, got 1"),
        ({"chat": [1, 2], "math": [2, 1]}, ["--strategy", "inverse"], "at least 3 sources, got 2"),
        (
            {"chat": [1, 2], "math": [2, 1]},
            ["--strategy", "match-load"],
            "match-load needs mixing.match (--match)",
        ),
        (
            {"chat": [1, 2], "math": [2, 1]},
            ["--strategy", "match-load", "--match", "law"],
            "mixing.match is law, which is none of chat, math",
        ),
        ({"chat": [], "math": [2, 1]}, ["--strategy", "uniqueness", "--min-gap", "0"], "has []"),
    ],
)
def test_update_refuses_it_too(tmp_path, capsys, loads, flags, message):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(loads))
    assert main(["update", "--load", str(path), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
