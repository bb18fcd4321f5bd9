"""`similarity` from a Hugging Face folder and from a run's checkpoint, before anything is trained."""

import json
import subprocess

import pytest
import transformers

from megatron_dynmix.commands.quickstart import VOCAB_SIZE, make_quickstart

MIXTRAL = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)
SETTINGS = ["--template", "vicuna", "--seq-length", "128", "--tokens", "12800"]


@pytest.fixture(scope="module")
def similarity(served, terminal, tmp_path_factory):
    """Run the command on sources with a tokenizer, and a model of random weights in the published format."""
    folder = tmp_path_factory.mktemp("similarity")
    make_quickstart(folder / "data")
    transformers.set_seed(1)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL)).save_pretrained(folder / "model")
    sources = [f"{name}={folder}/data/{name}.jsonl" for name in ("chat", "math", "math_again", "code")]
    common = [*sources, *SETTINGS, "--tokenizer", folder / "data/tokenizer"]

    def run(output, *more):
        command = [served, "similarity", folder / "model", *common, "--output", output, *more]
        done = subprocess.run(command, env=terminal, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return json.loads((output / "similarity.json").read_text())

    return run


@pytest.fixture(scope="module")
def found(similarity, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return similarity(folder), (folder / "similarity.html").read_text()


def test_two_files_of_one_generator_are_one_kind(found):
    found, page = found
    assert ["math", "math_again"] in found["kinds"]
    unique = dict(zip(found["sources"], found["unique"], strict=True))
    assert max(unique["math"], unique["math_again"]) < min(unique["chat"], unique["code"])
    assert "math, math_again are one kind" in page and "Which layers tell sources apart" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["--expert-model-parallel-size", "2"],
        ["--pipeline-model-parallel-size", "2"],
        ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    ],
)
def test_any_layout_finds_the_same(similarity, found, tmp_path, layout):
    same, (one_rank, _) = similarity(tmp_path, "--nproc-per-node", "2", *layout), found
    for what in ("load", "kinds", "tokens"):
        assert same[what] == one_rank[what]
