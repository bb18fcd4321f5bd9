"""What is written and read without Megatron-Core is what it writes and reads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import (  # noqa: F401
    prepare,
    sharegpt,
    tokenizer_dir_fixture,
    tokenizer_fixture,
    varied_rows,
    write_jsonl,
)
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_dynmix.data.index_file import index_head, read_index, token_dtype
from megatron_dynmix.data.prepared import file_of
from megatron_dynmix.data.tokenizer.base import Tokenizer


@pytest.mark.parametrize("size", [2, 65_499, 65_500, 65_501, 262_145])
def test_the_type_of_tokens_is_megatrons(size: int) -> None:
    assert token_dtype(size) is DType.optimal_dtype(size)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_head_is_megatrons(tmp_path: Path, dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype, multimodal=True)
    builder.add_item(torch.tensor([1, 2, 3]), 1)
    builder.add_item(torch.tensor([4]), 0)
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    head = index_head(dtype, sequences=2, documents=1)
    assert (tmp_path / "a.idx").read_bytes().startswith(head)
    index = read_index(tmp_path / "a")
    assert [array.tolist() for array in index] == [[3, 1], [0, 2], [1, 0]]


def test_a_prepared_source_is_read_as_megatron_reads_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare(tmp_path, varied_rows(40), tokenizer)
    ours, theirs = read_index(tmp_path / "source"), IndexedDataset(str(tmp_path / "source"), multimodal=True)
    assert np.array_equal(ours.lengths_Q, theirs.index.sequence_lengths)
    assert np.array_equal(ours.documents_D1, theirs.index.document_indices)
    assert np.array_equal(ours.modes_Q, theirs.index.sequence_modes)
    assert theirs.index.dtype is token_dtype(tokenizer.vocab_size)
    assert file_of(tmp_path / "source", "idx").stat().st_size > 40 * 8


WITHOUT = """
import sys
from megatron_dynmix.cli import main
code = main(sys.argv[1:])
heavy = [name for name in ("torch", "megatron", "transformers", "tensorboard") if name in sys.modules]
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize("how", ["files", "run"])
def test_preparing_imports_no_torch(tmp_path: Path, tokenizer_dir: Path, how: str) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [sharegpt("hi", "hello"), sharegpt("two?", "four")] * 4)
    flags = ["--input", str(rows), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir)]
    if how == "run":
        data = {
            "tokenizer": str(tokenizer_dir),
            "template": "vicuna",
            "sources": {"toy": {"path": str(rows)}},
        }
        config = {"data": {**data, "prepared_dir": str(tmp_path / "p"), "seq_length": 64}}
        (tmp_path / "RUN.yaml").write_text(json.dumps(config))
        flags = [str(tmp_path / "RUN.yaml")]
    else:
        flags += ["--seq-length", "64", "--workers", "2"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, "prepare", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "useful tokens" in done.stdout
