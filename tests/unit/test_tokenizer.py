import json
import runpy
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import TEXTS, sharegpt, tokenizer_dir_fixture, tokenizer_fixture, write_jsonl  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dynmix.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from megatron_dynmix.errors import InputError

TRAIN_TOKENIZER = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"


def hf(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(str(folder))


def edited(source: Path, target: Path, **settings: object) -> Path:
    """A copy of the tokenizer folder with other tokenizer_config.json settings; None removes one."""
    shutil.copytree(source, target)
    path = target / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return target


def test_trained_tokenizer_properties(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos, tokenizer.bos) == (1, 2, "</s>", "")
    assert 259 < tokenizer.vocab_size <= 400
    assert tokenizer.has_chat_template


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_to_tokens_and_back(tokenizer: Tokenizer, text: str) -> None:
    ((ids, starts),) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert ids.dtype == starts.dtype == np.int64
    assert len(ids) == len(starts)
    assert (np.diff(starts) >= 0).all()
    assert not len(starts) or (starts[0] >= 0 and starts[-1] < len(text))


def test_char_starts_by_hand(tokenizer: Tokenizer) -> None:
    ((ids, starts),) = tokenizer.encode_batch(["two  plus é</s>x"])
    pieces = [tokenizer.decode([token]) for token in ids]
    assert pieces[:4] == ["t", "wo", " ", " plus"]
    # the lone space begins at itself, " plus" at its p, both bytes of the accented letter at the letter
    assert starts.tolist() == [0, 1, 3, 5, 9, 10, 10, 11, 15]
    assert pieces[-2:] == ["</s>", "x"]


def test_char_starts_do_not_depend_on_trimmed_offsets(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    trimming = hf(tokenizer_dir)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "  two plus   two \n four  </s> x "
    ((_, expected),) = tokenizer.encode_batch([text])
    ((_, starts),) = Tokenizer(trimming).encode_batch([text])
    assert starts.tolist() == expected.tolist()


def test_no_special_tokens_truncation_or_padding(tokenizer_dir: Path) -> None:
    limited = hf(tokenizer_dir)
    limited.backend_tokenizer.enable_truncation(2)
    limited.backend_tokenizer.enable_padding(length=50)
    limited.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    adapted = Tokenizer(limited)
    ((ids, _),) = adapted.encode_batch(["x y z"])
    assert adapted.decode(ids) == "x y z"
    assert adapted.bos == "<s>"


def test_added_token_counts_for_vocab_size(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    larger = hf(tokenizer_dir)
    larger.add_tokens(["<extra>"])
    assert Tokenizer(larger).vocab_size == tokenizer.vocab_size + 1 == len(larger)
    assert Tokenizer(larger).fingerprint != tokenizer.fingerprint


def test_fingerprint(tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert load_tokenizer(tokenizer_dir).fingerprint == tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 64
    other = shutil.copytree(tokenizer_dir, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(other).fingerprint != tokenizer.fingerprint


def test_pad_falls_back_to_eos_and_template_may_be_missing(tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = edited(tokenizer_dir, tmp_path / "t", pad_token=None)
    (folder / "chat_template.jinja").unlink()
    plain = load_tokenizer(folder)
    assert plain.pad_id == plain.eos_id
    assert not plain.has_chat_template


def test_loading_never_opens_a_socket(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_tokenizer(tokenizer_dir)


def test_a_name_that_is_no_folder_is_not_looked_up(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        load_tokenizer("some-org/some-model")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer(tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_dir, tmp_path / "t")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(folder)


def test_eos_is_needed(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no EOS token"):
        load_tokenizer(edited(tokenizer_dir, tmp_path / "t", eos_token=None))


def test_slow_tokenizer_is_refused(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: Slow())
    with pytest.raises(InputError, match="a slow"):
        load_tokenizer(tokenizer_dir)


def test_training_is_deterministic_and_needs_room(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert train_bpe(TEXTS, 400, tmp_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(InputError, match="259"):
        train_bpe(TEXTS, 258, tmp_path)


def test_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [sharegpt("what is it", "it is this"), '{"bad'])

    def run(source: Path) -> int:
        flags = ["--input", str(source), "--vocab-size", "262", "--output", str(tmp_path / "t")]
        monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *flags])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TRAIN_TOKENIZER), run_name="__main__")
        return caught.value.code

    assert run(rows) == 0
    shown = capsys.readouterr()
    assert "262 tokens" in shown.out
    assert "rows.jsonl:2: left out: not JSON" in shown.err
    assert load_tokenizer(tmp_path / "t").vocab_size == 262
    assert run(tmp_path / "missing.jsonl") == 2
    assert "cannot be read" in capsys.readouterr().err
