"""The tool that makes one vector per source; the encoder itself is another project's."""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np

from megatron_dynmix.training.mix_setup import read_embeddings

TOOL = Path(__file__).parents[2] / "tools" / "embed_sources.py"


class LetterCounts:
    """Stands in for an encoder: how often a text holds an a and a b."""

    def __init__(self, folder):
        assert folder == "model"

    def encode(self, texts):
        return np.array([[text.count("a"), text.count("b")] for text in texts], dtype=np.float32)


def embed(monkeypatch, *flags):
    stand_in = types.SimpleNamespace(SentenceTransformer=LetterCounts)
    monkeypatch.setitem(sys.modules, "sentence_transformers", stand_in)
    monkeypatch.setattr(sys, "argv", ["embed_sources.py", "--model", "model", *flags])
    return runpy.run_path(str(TOOL))["main"]()


def source(folder, name, *texts):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"{name}={path}"


def test_each_source_is_the_mean_of_its_first_rows(tmp_path, monkeypatch, capsys):
    sources = [source(tmp_path, "one", "aab", "b", "aaaaaaa"), source(tmp_path, "two", "bb")]
    output = tmp_path / "vectors.npz"
    assert embed(monkeypatch, "--source", *sources, "--rows", "2", "--output", str(output)) == 0
    assert read_embeddings(output, ["two", "one"]) == [[0.0, 2.0], [1.0, 1.0]]
    assert "one: mean of 2 rows" in capsys.readouterr().out


def test_what_cannot_be_embedded_is_said(tmp_path, monkeypatch, capsys):
    output = str(tmp_path / "vectors.npz")
    assert embed(monkeypatch, "--source", "nothing", "--output", output) == 2
    assert "--source nothing: give NAME=FILE" in capsys.readouterr().err
    assert embed(monkeypatch, "--source", f"a={tmp_path}/gone.jsonl", "--output", output) == 2
    assert "gone.jsonl" in capsys.readouterr().err
