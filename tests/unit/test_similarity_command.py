"""What `similarity` refuses, each with one message, before a model is built."""

import json

import pytest
import yaml

from megatron_dynmix.cli import main

ROW = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})


@pytest.fixture
def sources(tmp_path):
    for name in ("chat.jsonl", "math.jsonl", "other/math.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(ROW + "\n")
    return tmp_path


def refused(capsys, *arguments):
    assert main(["similarity", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    return err


def test_no_model(sources, capsys):
    err = refused(
        capsys, sources, sources / "chat.jsonl", sources / "math.jsonl", "--output", sources / "out"
    )
    assert "config.json" in err and "config.yaml" in err
    assert not (sources / "out").exists()


def test_one_source_is_like_itself(sources, capsys):
    (sources / "config.json").write_text("{}")
    assert "only chat is given" in refused(
        capsys, sources, sources / "chat.jsonl", "--output", sources / "out"
    )
    assert "none is given" in refused(capsys, sources, "--output", sources / "out")


def test_two_of_one_name_and_one_that_is_not_there(sources, capsys):
    both = [sources / "math.jsonl", sources / "other/math.jsonl"]
    assert "NAME=PATH" in refused(capsys, sources, *both, "--output", sources / "out")
    assert "gone.jsonl" in refused(
        capsys, sources, "a=" + str(sources / "gone.jsonl"), "--output", sources / "out"
    )


@pytest.mark.parametrize("flag", [["--tokens", "0"], ["--nproc-per-node", "0"], ["--no-such-flag"]])
def test_flags(sources, capsys, flag):
    (sources / "config.yaml").write_text(yaml.safe_dump({"model": {"preset": "tiny"}}))
    both = [sources / "chat.jsonl", sources / "math.jsonl"]
    assert flag[0][2:].split("=")[0] in refused(capsys, sources, *both, "--output", sources / "out", *flag)


def test_a_dense_model_has_no_router(sources, capsys):
    model = {"preset": "tiny", "num_moe_experts": None, "vocab_size": 64}
    (sources / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {"seq_length": 64}}))
    both = [sources / "chat.jsonl", sources / "math.jsonl"]
    assert "dense" in refused(capsys, sources, *both, "--output", sources / "out", "--tokenizer", sources)
