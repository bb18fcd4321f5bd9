import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_dynmix import platform
from megatron_dynmix.commands import quickstart
from megatron_dynmix.commands.quickstart import in_words, make_quickstart, write_run_yaml, write_sources
from megatron_dynmix.data.prepare.formats import parse_sharegpt
from megatron_dynmix.data.prepare.template import Renderer
from megatron_dynmix.data.tokenizer.load import load_tokenizer
from megatron_dynmix.errors import InputError


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("quickstart"), seed=1234)


def test_one_seed_gives_the_same_bytes_and_another_seed_does_not(sources, tmp_path):
    again = write_sources(tmp_path / "again", seed=1234)
    other = write_sources(tmp_path / "other", seed=5)
    for name, source in sources.items():
        for part, path in source.items():
            assert again[name][part].read_bytes() == path.read_bytes()
            assert other[name][part].read_bytes() != path.read_bytes()


def test_the_four_sources_hold_1500_train_and_100_probe_examples(sources):
    assert list(sources) == ["chat", "math", "math_again", "code"]
    for source in sources.values():
        assert len(read(source["train"])) == 1500
        assert len(read(source["probe"])) == 100


def test_every_example_is_sharegpt_with_answers_of_40_to_150_characters(sources):
    for source in sources.values():
        for example in [*read(source["train"]), *read(source["probe"])]:
            turns = example["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert all(40 <= len(turn["value"]) <= 150 for turn in turns[1::2])


def test_no_conversation_occurs_twice_in_any_file(sources):
    conversations = [
        json.dumps(example["conversations"])
        for source in sources.values()
        for path in source.values()
        for example in read(path)
    ]
    assert len(set(conversations)) == len(conversations) == 6400


def test_ids_are_unique(sources):
    ids = [example["id"] for source in sources.values() for path in source.values() for example in read(path)]
    assert len(set(ids)) == 6400


def test_chat_has_one_and_two_rounds_with_and_without_system_prompt(sources):
    examples = read(sources["chat"]["train"])
    assert {len(example["conversations"]) for example in examples} == {2, 4}
    with_prompt = sum("system_prompt" in example for example in examples)
    assert 0.2 < with_prompt / len(examples) < 0.4


def test_worked_arithmetic_is_right(sources):
    for name in ("math", "math_again"):
        for example in read(sources[name]["probe"]):
            answer = example["conversations"][1]["value"]
            work, result = answer.rstrip(".").split(" The answer is ")
            expression, equals = work.split(": ")[1].rstrip(".").split(" = ")
            left, sign, right = expression.split()
            expected = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
            }[sign]
            assert int(result) == int(equals.split(",")[0]) == expected


def test_python_answers_compile(sources):
    answers = [example["conversations"][1]["value"] for example in read(sources["code"]["train"])]
    functions = [answer for answer in answers if answer.startswith("def ")]
    assert 500 < len(functions) < 1000
    for function in functions:
        compile(function, "answer", "exec")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (19, "nineteen"),
        (20, "twenty"),
        (87, "eighty-seven"),
        (99, "ninety-nine"),
    ],
)
def test_in_words(number, words):
    assert in_words(number) == words


def test_run_yaml_names_the_files_relative_to_its_own_folder(tmp_path):
    sources = write_sources(tmp_path / "sources", seed=1)
    path = write_run_yaml(tmp_path, sources, seed=7)
    run = yaml.safe_load(path.read_text())
    assert run["model"] == {"preset": "tiny", "vocab_size": 1024}
    assert run["mixing"] == {"strategy": "uniqueness", "interval": 10, "signal": "train"}
    assert run["training"]["seed"] == 7
    assert run["optimizer"]["lr"] == 3.0e-3
    assert run["data"]["sources"]["math_again"] == {
        "path": "sources/math_again.jsonl",
        "probe": "sources/math_again.probe.jsonl",
        "weight": 0.25,
    }


def test_an_edited_file_is_refused_not_overwritten(tmp_path):
    path = write_run_yaml(tmp_path, write_sources(tmp_path, seed=1))
    path.write_text("mine: true\n")
    with pytest.raises(InputError, match=r"RUN\.yaml exists"):
        write_run_yaml(tmp_path, write_sources(tmp_path, seed=1))
    assert path.read_text() == "mine: true\n"


def test_make_quickstart_makes_a_tokenizer_that_fits_every_example_into_a_row(tmp_path):
    path = make_quickstart(tmp_path / "run", seed=3)
    assert path == tmp_path / "run" / "RUN.yaml"
    run = yaml.safe_load(path.read_text())
    assert run["training"]["seed"] == 3
    tokenizer = load_tokenizer(path.parent / run["data"]["tokenizer"])
    assert tokenizer.vocab_size == run["model"]["vocab_size"]
    for source in run["data"]["sources"].values():
        for example in read(path.parent / source["path"]) + read(path.parent / source["probe"]):
            text = Renderer(tokenizer, run["data"]["template"]).render(parse_sharegpt(example)).text
            [(ids_T, _)] = tokenizer.encode_batch([text])
            assert len(ids_T) <= run["data"]["seq_length"]
            assert tokenizer.decode(ids_T.tolist()) == text


@pytest.mark.parametrize(("gpus", "flags"), [(2, []), (1, ["--expert-model-parallel-size", "1"])])
def test_quickstart_trains_on_one_gpu_where_there_is_one(gpus, flags, monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(platform, "most_ranks", lambda wanted: min(wanted, gpus))
    monkeypatch.setattr(quickstart, "make_quickstart", lambda folder: folder / "RUN.yaml")
    monkeypatch.setattr(quickstart, "train", lambda *given, **named: asked.append((given[1], named)) or 0)
    assert quickstart.run(SimpleNamespace(run_dir=tmp_path), []) == 0
    assert asked == [(flags, {"world_size": gpus})]
    shown = " ".join(["RUN.yaml", *flags, "--run-dir runs/mine --nproc-per-node"])
    assert f"{shown} {gpus}\n" in capsys.readouterr().out
