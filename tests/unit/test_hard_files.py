"""What becomes of every bad and nasty file; the real collection too, where it lies beside the checkout."""

import json
import re
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import prepare_files, tokenizer_dir_fixture, tokenizer_fixture  # noqa: F401
from hard_files import HARD, HardFile

from megatron_dynmix.data.prepare.formats import find_format
from megatron_dynmix.data.prepare.readers import raw_rows
from megatron_dynmix.data.prepare.template import Renderer, token_mask
from megatron_dynmix.data.tokenizer.base import Tokenizer
from megatron_dynmix.errors import InputError

REAL = Path(__file__).parents[3] / "shared/data/hard"


def outcome(path: Path, renderer: Renderer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the lines that become examples, and of those that are refused."""
    good, bad = [], []
    parsed = []
    for row in raw_rows(path):
        try:
            parsed.append((row.place, row.parse()))
        except ValueError as error:
            parsed.append((row.place, error))
    known = find_format(parsed)
    for place, value in parsed:
        number = int(re.search(r"\d+$", place)[0])
        try:
            if isinstance(value, ValueError):
                raise value
            rendered = renderer.render(known.parse(value))
        except ValueError as error:
            assert "\n" not in str(error) and str(error)
            bad.append(number)
            continue
        ((ids, starts),) = renderer.tokenizer.encode_batch([rendered.text])
        trained = token_mask(starts, rendered.trained_spans)
        assert trained.any(), "a row that trains on nothing"
        assert (ids[trained] == renderer.tokenizer.eos_id).sum() == len(rendered.trained_spans)
        assert not np.isin(ids[~trained], [renderer.tokenizer.eos_id]).any()
        good.append(number)
    return tuple(good), tuple(bad)


@pytest.mark.parametrize("template", ["vicuna", "plain", "tokenizer"])
@pytest.mark.parametrize("name", HARD)
def test_I12_every_row_of_a_hard_file(tmp_path: Path, tokenizer: Tokenizer, name: str, template: str) -> None:
    check(write(tmp_path, name), HARD[name], Renderer(tokenizer, template))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real collection is not here")
@pytest.mark.parametrize("name", HARD)
def test_I12_the_real_collection_has_the_same_outcome(tokenizer: Tokenizer, name: str) -> None:
    expected = HARD[name]
    check(REAL / f"{name}.jsonl", expected, Renderer(tokenizer, "vicuna"))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real collection is not here")
def test_the_generated_files_are_the_real_collection_by_name_and_verdict() -> None:
    manifest = {entry["file"]: entry for entry in json.loads((REAL / "MANIFEST.json").read_text())}
    assert {f"{name}.jsonl" for name in HARD} == set(manifest)
    # lines that the manifest leaves to us: OpenAI's role names in ShareGPT's shape are taken, and a row that
    # says of its only answer that it is not trained on is not
    taken, left = {"44_unknown_roles": {5}}, {"52_extra_keys": {2}}
    for name, hard in HARD.items():
        entry = manifest[f"{name}.jsonl"]
        if entry["expect"] == "reject_file":
            assert hard.refused
        elif entry["expect"] == "truncate_or_reject":
            assert hard.good == (1, 2, 3)
        else:
            more, less = taken.get(name, set()), left.get(name, set())
            assert set(hard.bad) == set(entry["bad_lines"]) - more | less
            assert set(hard.good) == set(entry["good_lines"]) - less | more


@pytest.mark.parametrize("name", [name for name, hard in HARD.items() if hard.bad])
def test_I12_prepare_counts_the_bad_rows_and_strict_stops_at_the_first(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    path, hard = write(tmp_path, name), HARD[name]
    settings = {"name": "hard", "inputs": [path], "tokenizer": tokenizer, "workers": 1}
    report = prepare_files(prefix=tmp_path / "out", **settings)
    assert (report.examples, report.broken) == (len(hard.good), len(hard.bad))
    shown = [re.match(rf"{re.escape(str(path))}:(\d+): .", text)[1] for text in report.first_broken]
    assert [int(number) for number in shown] == list(hard.bad[:5])
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}:{hard.bad[0]}: "):
        prepare_files(prefix=tmp_path / "strict", strict=True, **settings)


def write(folder: Path, name: str) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_bytes(HARD[name].content)
    return path


def check(path: Path, expected: HardFile, renderer: Renderer) -> None:
    start = time.monotonic()
    if expected.refused:
        with pytest.raises(InputError) as caught:
            outcome(path, renderer)
        assert str(path) in str(caught.value)
        assert expected.refused in str(caught.value)
    else:
        assert outcome(path, renderer) == (expected.good, expected.bad)
    # 200,000 letters or 2,000 turns took minutes where something grew with their square
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
@pytest.mark.parametrize("template", ["vicuna", "tokenizer"])
def test_real_rows_go_to_tokens_and_back(tokenizer: Tokenizer, template: str) -> None:
    renderer = Renderer(tokenizer, template)
    folder = REAL.parent
    names = [f"formats/{name}_sample" for name in ("alpaca", "messages")]
    names += [f"{name}/dev" for name in ("chat", "code", "math", "general")]
    for name in names:
        path = folder / f"{name}.jsonl"
        shape = find_format((row.place, row.parse()) for row in raw_rows(path))
        for row in islice(raw_rows(path), 100):
            conversation = shape.parse(row.parse())
            rendered = renderer.render(conversation)
            ((ids, starts),) = tokenizer.encode_batch([rendered.text])
            mask = token_mask(starts, rendered.trained_spans)
            assert tokenizer.decode(ids) == tokenizer.special.unguard(rendered.text)
            answers = [turn.text for turn in conversation.turns if turn.role == "assistant"]
            assert tokenizer.decode(ids[mask]) == "".join(f" {answer}</s>" for answer in answers), row.place
