"""Answers are made of the tokens that a model would write behind the prompt alone."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_fixtures import TEXTS, prepare, sharegpt, tokenizer_dir_fixture, tokenizer_fixture  # noqa: F401
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.data.tokenizer.borders import encode_answers
from megatron_dynmix.data.tokenizer.fast import FastTokenizer
from megatron_dynmix.data.tokenizer.folder import TokenizerFiles
from megatron_dynmix.data.tokenizer.load import load_tokenizer

Kinds = dict[str, Tokenizer]
GPT2 = r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MERGED = [
    *TEXTS,
    "a\n\nb\n\n\nc :\n\n x:\n 2023 1234 12 ok\t\tno  two",
    "\n\n\n\n \n\n two \ttwo :two :\n",
] * 20
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(pattern: str) -> FastTokenizer:
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return trained(backend, pre_tokenizers.ByteLevel.alphabet())


def spaced(kind: str) -> FastTokenizer:
    """As Llama-2's, old (a normalizer puts the space in front) and new (the pre-tokenizer does)."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return trained(backend, list("</>'.,"))


def trained(backend: Backend, alphabet: list[str]) -> FastTokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(MERGED, trainer)
    return FastTokenizer(TokenizerFiles(backend, NAMES, None))


def sentencepiece_model(**options: object) -> Callable[[Path], Tokenizer]:
    def load(folder: Path) -> Tokenizer:
        model = io.BytesIO()
        texts = [*MERGED, "123 1 12 2023 " * 3, "Code? one two\n"] * 3
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=330, byte_fallback=True,
            minloglevel=2, hard_vocab_limit=False, **options,
        )  # fmt: skip
        path = folder / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return load_tokenizer(path)

    return load


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "gpt2": lambda _: byte_level(GPT2),
    "llama3": lambda _: byte_level(LLAMA3),
    "prepend": lambda _: spaced("prepend"),
    "metaspace always": lambda _: spaced("always"),
    "metaspace first": lambda _: spaced("first"),
    "sentencepiece": sentencepiece_model(model_type="bpe"),
    "sentencepiece as llama": sentencepiece_model(
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "unigram": sentencepiece_model(model_type="unigram"),
}


@pytest.fixture(scope="module", name="kinds")
def kinds_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {kind: make(tmp_path_factory.mktemp("kind")) for kind, make in KINDS.items()}


ENDS = [
    "",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "assistant\n",
    "ASSISTANT:",
    ":\n\n",
    "<think>\n",
    "12",
    "。",
    "e",
]
STARTS = [
    *("", "two", " two", "\ntwo", "\n\n    x", "  two", "\ttwo", "\u3000two", "１２３ two", "ﬁne", "①②"),
    *("\u0301x", "2023", "3", "'s", "\U0001f642", "。", ":\n"),
]


def ids_of(tokenizer: Tokenizer, text: str, *, inside: bool = False) -> list[int]:
    ((ids_T, _),) = tokenizer.encode_batch([text], inside=inside)
    return ids_T.tolist()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(
    rounds=st.lists(
        st.tuples(st.sampled_from(ENDS), st.sampled_from(STARTS), st.booleans()), min_size=1, max_size=4
    )
)
@example(rounds=[("assistant\n", "\n\n    x", False)] * 3)
@example(rounds=[("ASSISTANT:", "</s>", True), ("12", "3", True)])
def test_prompts_have_the_tokens_that_they_have_alone(
    kinds: Kinds, kind: str, rounds: list[tuple[str, str, bool]]
) -> None:
    tokenizer, text, borders = kinds[kind], "", []
    for end, start, is_guarded in rounds:
        text += f"<s>question {tokenizer.special.guard('</s>') if is_guarded else ''}two{end}"
        borders.append(len(text))
        text += f"{tokenizer.special.guard(start)}</s>"
    (answered,) = encode_answers(tokenizer, [text], [borders])
    heads = np.searchsorted(answered.char_starts_T, borders).tolist()
    first = text[: borders[0]]
    assert answered.ids_T[: heads[0]].tolist() == ids_of(tokenizer, first)
    assert (np.diff(answered.char_starts_T) >= 0).all()
    for border, head in zip(borders, heads, strict=True):
        prompt = ids_of(tokenizer, text[text.rindex("<s>", 0, border) : border])
        assert answered.ids_T[head - len(prompt) : head].tolist() == prompt
    if answered.cuts == 0:
        assert answered.ids_T.tolist() == ids_of(tokenizer, text)
    ends = np.flatnonzero(answered.ids_T == tokenizer.eos_id)
    assert len(ends) == len(borders)  # each answer's end is there, behind its border
    assert (answered.char_starts_T[ends] >= borders).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_an_answer_that_is_cut_off_has_its_own_tokens(kinds: Kinds, kind: str) -> None:
    tokenizer, cuts = kinds[kind], 0
    pairs = [(f"<s>two{end}", f"{start} and more</s>") for end in ENDS for start in STARTS]
    texts, borders = [prompt + answer for prompt, answer in pairs], [[len(prompt)] for prompt, _ in pairs]
    whole = tokenizer.encode_batch(texts)
    for (prompt, answer), (ids_T, _), one in zip(
        pairs, whole, encode_answers(tokenizer, texts, borders), strict=True
    ):
        prompt_ids, cuts = ids_of(tokenizer, prompt), cuts + one.cuts
        apart = prompt_ids + ids_of(tokenizer, answer)
        assert one.ids_T.tolist() == (apart if one.cuts else ids_T.tolist())
        assert int(np.searchsorted(one.char_starts_T, len(prompt))) == len(prompt_ids)
    assert 10 < cuts < len(pairs) / 2


def test_an_answer_of_compatibility_characters_is_trained_from_its_first_token(
    kinds: Kinds,
) -> None:
    tokenizer = kinds["sentencepiece"]
    prompt = "Code?\n"
    (answered,) = encode_answers(tokenizer, [f"{prompt}１２３ two</s>"], [[len(prompt)]])
    head = int(np.searchsorted(answered.char_starts_T, len(prompt)))
    assert answered.cuts == 0
    assert answered.ids_T[:head].tolist() == ids_of(tokenizer, prompt)
    assert answered.ids_T[head:].tolist() == ids_of(tokenizer, "123 two</s>")


def test_a_cut_puts_no_space_in_front_of_the_answer(kinds: Kinds) -> None:
    for kind in ("prepend", "metaspace always", "metaspace first", "sentencepiece as llama"):
        tokenizer = kinds[kind]
        (answered,) = encode_answers(tokenizer, ["<s>question two</s>"], [[len("<s>question t")]])
        assert answered.cuts == 1, kind
        assert tokenizer.decode(answered.ids_T).replace("<s> ", "<s>") == "<s>question two</s>"


def test_cuts_and_letters_of_special_tokens_are_counted(tmp_path: Path, kinds: Kinds) -> None:
    rows = [sharegpt("two", "\n\nx"), sharegpt("two <s>", "three </s> <s>"), sharegpt("two", "three")]
    report = prepare(tmp_path, rows, kinds["llama3"], template="plain")
    counted = {(one.kind, one.detail): (one.rows, one.first.rpartition(":")[2]) for one in report.notices}
    assert counted == {
        ("straddled border", ""): (1, "1"),
        ("special token in text", "<s>"): (1, "2"),
        ("special token in text", "</s>"): (1, "2"),
    }


def test_many_answers_take_time_in_proportion(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = 0
    real = FastTokenizer.encode_batch

    def counted(self: FastTokenizer, texts: list[str], *, inside: bool = False) -> list:
        nonlocal encoded
        encoded += sum(map(len, texts)) * (not inside)
        return real(self, texts, inside=inside)

    monkeypatch.setattr(FastTokenizer, "encode_batch", counted)
    round_text = "<s>two plus\n"
    texts = {count: (round_text + "\ntwo</s>") * count for count in (50, 500)}
    seen = {}
    for count, text in texts.items():
        encoded = 0
        size = len(text) // count
        encode_answers(tokenizer, [text], [[size * at + len(round_text) for at in range(count)]])
        seen[count] = encoded
    assert seen[500] < 11 * seen[50]
