import base64
import io
import json
import pickle
import runpy
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_fixtures import TEXTS, sharegpt, tokenizer_dir_fixture, tokenizer_fixture, write_jsonl  # noqa: F401
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.fast import FastTokenizer, train_bpe
from megatron_dynmix.data.tokenizer.folder import of_transformers
from megatron_dynmix.data.tokenizer.load import load_tokenizer
from megatron_dynmix.data.tokenizer.special import GUARD
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
    assert tokenizer.chat_template


@given(text=st.text(st.characters(exclude_categories=["Cs"], max_codepoint=GUARD - 1)))
@example(text="<s> a</s>b<pad></s>")
def test_text_to_tokens_and_back(tokenizer: Tokenizer, text: str) -> None:
    guarded = tokenizer.special.guard(text)
    ((ids, starts),) = tokenizer.encode_batch([guarded])
    assert not tokenizer.special_ids & set(ids.tolist())
    assert tokenizer.decode(ids) == text
    assert ids.dtype == starts.dtype == np.int64
    assert len(ids) == len(starts)
    assert (np.diff(starts) >= 0).all()
    assert not len(starts) or (starts[0] >= 0 and starts[-1] < len(guarded))


def test_char_starts_by_hand(tokenizer: Tokenizer) -> None:
    ((ids, starts),) = tokenizer.encode_batch(["two  plus é</s>x"])
    pieces = [tokenizer.decode([token]) for token in ids]
    assert pieces[:4] == ["t", "wo", " ", " plus"]
    # both bytes of the accented letter at the letter
    assert starts.tolist() == [0, 1, 3, 4, 9, 10, 10, 11, 15]
    assert pieces[-2:] == ["</s>", "x"]


def test_char_starts_do_not_depend_on_trimmed_offsets(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    trimming = hf(tokenizer_dir)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "  two plus   two \n four  </s> x "
    ((_, expected),) = tokenizer.encode_batch([text])
    ((_, starts),) = FastTokenizer(of_transformers(trimming)).encode_batch([text])
    assert starts.tolist() == expected.tolist()


def test_no_special_tokens_truncation_or_padding(tokenizer_dir: Path) -> None:
    limited = hf(tokenizer_dir)
    limited.backend_tokenizer.enable_truncation(2)
    limited.backend_tokenizer.enable_padding(length=50)
    limited.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    adapted = FastTokenizer(of_transformers(limited))
    ((ids, _),) = adapted.encode_batch(["x y z"])
    assert adapted.decode(ids) == "x y z"
    assert adapted.bos == "<s>"


def test_added_token_counts_for_vocab_size(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    larger = hf(tokenizer_dir)
    larger.add_tokens(["<extra>"])
    assert FastTokenizer(of_transformers(larger)).vocab_size == tokenizer.vocab_size + 1 == len(larger)
    assert FastTokenizer(of_transformers(larger)).fingerprint != tokenizer.fingerprint


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
    assert not plain.chat_template


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


def test_what_has_no_tokenizer_json_is_converted_if_it_can_be(
    tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: hf_tokenizer)
    hf_tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_dir))
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint

    class Slow:
        is_fast = False

    hf_tokenizer = Slow()
    with pytest.raises(InputError, match="a slow"):
        load_tokenizer(tmp_path)


def test_training_is_deterministic_and_needs_room(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert train_bpe(TEXTS, 400, tmp_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(InputError, match="259"):
        train_bpe(TEXTS, 258, tmp_path)
    (tmp_path / "file").touch()
    for place in ("file", "file/folder"):
        with pytest.raises(InputError, match=r"file.* is no folder to write to"):
            train_bpe(TEXTS, 400, tmp_path / place)


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
    assert "there is no such file" in capsys.readouterr().err


def sentencepiece_model(folder: Path, kind: str) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=model, vocab_size=295, byte_fallback=True,
        model_type=kind, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def tiktoken_file(folder: Path, **changed: object) -> Path:
    words = [*(bytes([i]) for i in range(256)), b"tw", b"two", b" plus"]
    path = folder / "words.tiktoken"
    path.write_text("".join(f"{base64.b64encode(word).decode()} {i}\n" for i, word in enumerate(words)))
    settings = {
        "pattern": r" ?\p{L}+|\s+|[^\s\p{L}]+",
        "special_tokens": {"<s>": 300, "</s>": 301},
        "eos_token": "</s>",
        "bos_token": "<s>",
    }
    (folder / "words.tiktoken.json").write_text(json.dumps({**settings, **changed}))
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(tmp_path: Path, kind: str) -> None:
    path = sentencepiece_model(tmp_path, kind)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos, tokenizer.bos, tokenizer.eos_id, tokenizer.pad_id) == ("</s>", "<s>", 2, 2)
    text = "two plus two"
    ((ids, starts),) = tokenizer.encode_batch([f"<s>{text}</s>"])
    assert ids.tolist() == [1, *sentencepiece.SentencePieceProcessor(str(path)).encode(text), 2]
    assert starts.tolist()[:2] == [0, 3]
    assert starts.tolist()[-1] == len(text) + 3
    assert tokenizer.decode(ids) == f"<s>{text}</s>"
    assert max(ids) < tokenizer.vocab_size
    assert load_tokenizer(path).fingerprint == tokenizer.fingerprint
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch([text])[0][0].tolist() == ids.tolist()[1:-1]


def test_tiktoken(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiktoken_file(tmp_path))
    ((ids, starts),) = tokenizer.encode_batch(["<s>two plus é!</s>"])
    assert ids.tolist() == [300, 257, 258, 32, 195, 169, 33, 301]
    assert starts.tolist() == [0, 3, 6, 11, 12, 12, 13, 14]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos) == (302, 301, "<s>")
    assert tokenizer.decode(ids) == "<s>two plus é!</s>"
    other = tmp_path / "other"
    other.mkdir()
    assert load_tokenizer(tiktoken_file(other, pattern=r"\s+|\S+")).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["bpe", "unigram", "tiktoken"])
@given(data=st.data())
def test_literal_special_tokens_stay_text_in_every_kind(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    if kind not in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        path = tiktoken_file(folder) if kind == "tiktoken" else sentencepiece_model(folder, kind)
        KINDS[kind] = load_tokenizer(path)
    tokenizer = KINDS[kind]
    words = data.draw(st.lists(st.sampled_from(["<s>", "</s>", "a", "two", " plus", "é", "\n", " "])))
    guarded = tokenizer.special.guard("".join(words))
    ((ids, starts),) = tokenizer.encode_batch([f"{tokenizer.bos}{guarded}{tokenizer.eos}"])
    special = [int(token) for token in ids if int(token) in tokenizer.special_ids]
    assert special == [ids[0], ids[-1]] == [tokenizer.special.ids["<s>"], tokenizer.eos_id]
    assert (np.diff(starts) >= 0).all()
    assert starts[-1] == len(guarded) + 3
    if kind == "tiktoken":
        assert tokenizer.decode(ids) == "<s>" + "".join(words) + "</s>"


KINDS: dict[str, Tokenizer] = {}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.model", b"junk", "no SentencePiece model"),
        ("a.json", b"{}", "neither .model"),
        ("a.tiktoken", b"junk", "a.tiktoken.json beside it cannot be read"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    "changed", [{"eos_token": "<end>"}, {"pattern": None}, {"special_tokens": ["</s>"]}, {"bos_token": "<b>"}]
)
def test_tiktoken_settings(tmp_path: Path, changed: dict) -> None:
    with pytest.raises(InputError, match=r"words.tiktoken.json: must hold"):
        load_tokenizer(tiktoken_file(tmp_path, **changed))


def test_tiktoken_ranks_that_are_none(tmp_path: Path) -> None:
    path = tiktoken_file(tmp_path)
    path.write_text("not base64\n")
    with pytest.raises(InputError, match="not a file of ranks"):
        load_tokenizer(path)


def test_the_hub_is_asked_only_by_its_name_and_code_is_not_trusted_unless_asked(
    tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded, run, real = [], [], AutoTokenizer.from_pretrained

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        downloaded.append((repository, "*.py" in allow_patterns))
        return str(tokenizer_dir)

    def from_pretrained(source: str, **options: object) -> object:
        run.append((source, options["local_files_only"], options["trust_remote_code"]))
        return real(str(tokenizer_dir))

    with_code = edited(tokenizer_dir, tmp_path / "t", auto_map={"AutoTokenizer": [None, "own.Fast"]})
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_tokenizer("hf://some-org/some-model")
    load_tokenizer("hf://some-org/some-model", trust_remote_code=True)
    assert downloaded == [("some-org/some-model", False), ("some-org/some-model", True)]
    assert load_tokenizer(with_code).fingerprint == tokenizer.fingerprint
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    load_tokenizer(with_code, trust_remote_code=True)
    assert run == [(str(with_code), True, True)]


def test_nothing_is_unpickled(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    for path in (tokenizer_dir, sentencepiece_model(tmp_path, "bpe"), tiktoken_file(tmp_path)):
        load_tokenizer(path)


def test_a_pickled_tokenizer_still_takes_literal_special_tokens_for_text(tokenizer: Tokenizer) -> None:
    guarded = tokenizer.special.guard("a</s>b")
    ((expected, _),) = tokenizer.encode_batch([guarded])
    ((ids, _),) = pickle.loads(pickle.dumps(tokenizer)).encode_batch([guarded])
    assert ids.tolist() == expected.tolist()
    assert tokenizer.eos_id not in ids


def test_a_tokenizer_that_cannot_write_its_special_token_as_text(tokenizer_dir: Path) -> None:
    backend = BackendTokenizer(models.WordLevel({"</s>": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wordy = FastTokenizer(
        of_transformers(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    )
    with pytest.raises(InputError, match="'</s>' of the same letters"):
        wordy.encode_batch([wordy.special.guard("a </s> a")])


def test_private_characters_are_refused(tokenizer: Tokenizer) -> None:
    assert tokenizer.special.guard("\ue000 \U000f0001") == "\ue000 \U000f0001"
    for character in (chr(GUARD), "\U0010ffff"):
        with pytest.raises(ValueError, match="private character U\\+10"):
            tokenizer.special.guard(f"a{character}")


BATTERY = [
    "2023 was 1,234.5 or 12345678",
    "  two  spaces\n\n\nx \n y",
    "\ufb01 \uff11\uff12\uff13 \u00e9 e\u0301 \u212b",
    "a\tb\u3000c",
    "don't I'LL",
    "\u4e2d\u6587 \u304b\u306a \U0001f642\U0001f3fd",
    "<think>x</think>\n",
    "HTTPServer2 snake_case()",
]


@pytest.mark.parametrize(
    "kind", ["GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", None]
)
@pytest.mark.parametrize("prefix", ["bytes", "metaspace", "prepend"])
def test_ids_are_those_of_the_file_whatever_class_is_named(
    tokenizer_dir: Path, tmp_path: Path, kind: str | None, prefix: str
) -> None:
    folder = edited(tokenizer_dir, tmp_path / "t", tokenizer_class=kind, unk_token="<unk>")
    backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    words = {
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="first"),
        "prepend": pre_tokenizers.ByteLevel(add_prefix_space=True),
    }
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words[prefix]])
    backend.normalizer = normalizers.NFC()
    backend.add_tokens(["202", "<think>"])
    backend.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    expected = [backend.encode(text, add_special_tokens=False).ids for text in BATTERY]
    assert [ids.tolist() for ids, _ in loaded.encode_batch(BATTERY)] == expected


def test_tokens_that_only_the_configuration_names(tokenizer_dir: Path, tmp_path: Path) -> None:
    decoder = {"500": {"content": "<call>", "special": False, "normalized": False}}
    settings = {"added_tokens_decoder": decoder, "image_token": "<image>"}
    folder = edited(tokenizer_dir, tmp_path / "t", additional_special_tokens=["<|end|>"], **settings)
    ours, theirs = load_tokenizer(folder), hf(folder)
    texts = ["<call>a<|end|>", "<image> </s>"]
    assert {"<|end|>", "<image>", "</s>"} <= set(ours.special.ids)
    assert "<call>" not in ours.special.ids
    assert [ids.tolist() for ids, _ in ours.encode_batch(texts)] == theirs(texts)["input_ids"]
    assert ours.template_names["image_token"] == "<image>"


def test_special_tokens_of_older_files_and_of_classes(tokenizer_dir: Path, tmp_path: Path) -> None:
    older = edited(tokenizer_dir, tmp_path / "older", eos_token=None, bos_token=None)
    (older / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')
    assert load_tokenizer(older).eos == "</s>"
    silent = edited(tokenizer_dir, tmp_path / "silent", eos_token=None, tokenizer_class="GPT2Tokenizer")
    assert load_tokenizer(silent).eos == hf(silent).eos_token == "<|endoftext|>"
    assert load_tokenizer(silent).eos_id == hf(silent).eos_token_id


def test_named_templates(tokenizer_dir: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder = edited(tokenizer_dir, tmp_path / "t", chat_template=named)
    assert load_tokenizer(folder).chat_template == hf(folder).chat_template  # the file wins
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("c")
    assert load_tokenizer(folder).chat_template == hf(folder).chat_template
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates/tool_use.jinja").unlink()
    assert (
        load_tokenizer(folder).chat_template == {"default": "a", "tool_use": "b"} == hf(folder).chat_template
    )
