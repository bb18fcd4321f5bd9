"""The command `prepare`: flags, exit codes and what it prints."""

import json
from pathlib import Path

import pytest
from config_fixtures import good_settings, write
from data_fixtures import (  # noqa: F401
    sharegpt,
    tokenizer_dir_fixture,
    varied_rows,
    write_jsonl,
)

from megatron_dynmix.cli import main
from megatron_dynmix.commands import prepare as prepare_command
from megatron_dynmix.data.prepared import load_report


@pytest.fixture(name="run_yaml")
def run_yaml_fixture(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """Three sources without probes; the second holds two texts of the first."""
    content = good_settings(tmp_path)
    content["data"] |= {"tokenizer": str(tokenizer_dir), "template": "vicuna", "seq_length": 256}
    first = varied_rows(8)
    for seed, source in enumerate(content["data"]["sources"].values()):
        rows = varied_rows(8, seed) + (first[:2] if seed == 1 else [])
        write_jsonl(tmp_path / source["path"], rows)
        write_jsonl(tmp_path / source.pop("probe"), first[2:3])
    return write(tmp_path, content)


def test_probe_is_held_out_of_every_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_yaml: Path
) -> None:
    assert main(["prepare", str(run_yaml), "--probe", "3", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("(probe)") >= 3
    for probe in (tmp_path / "prepared").glob("*.probe.json"):
        report = load_report(probe.with_name(probe.name.removesuffix(".json")))
        assert report.examples == 3 and report.probe_of is not None
    assert len(list((tmp_path / "prepared").glob("*.probe.json"))) == 3
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").glob("*.bin")}
    assert main(["prepare", str(run_yaml), "--probe", "3"]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_texts_in_two_sources_are_reported(capsys: pytest.CaptureFixture[str], run_yaml: Path) -> None:
    assert main(["prepare", str(run_yaml)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(lines) == 1 and lines[0].startswith("WARNING: 2 texts stand in both ")


def test_text_that_is_trained_on_and_probed_is_reported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer_dir: Path
) -> None:
    rows = varied_rows(4)
    write_jsonl(tmp_path / "chat.jsonl", rows)
    write_jsonl(tmp_path / "held.jsonl", rows[:1])
    content = good_settings(tmp_path)
    content["data"] |= {"tokenizer": str(tokenizer_dir), "template": "vicuna", "seq_length": 256}
    content["data"]["sources"] = {"chat": {"path": "chat.jsonl", "probe": "held.jsonl"}}
    assert main(["prepare", str(write(tmp_path, content))]) == 0
    assert (
        "WARNING: 1 text stands in both chat and chat (probe): what is trained on is not held out"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--probe", "0"], ["--probe is 0", "1 or more"]),
        (["--workers", "0"], ["workers is 0", "1 or more"]),
        (["--overlong", "truncate"], ["--overlong truncate needs --seq-length"]),
        (["--overlong", "cut", "--seq-length", "9"], ["--overlong is 'cut'", "drop, truncate, split, error"]),
        (["--seq-length", "0"], ["--seq-length is 0", "1 or more"]),
        (["--fields", "prompt"], ["--fields has 'prompt'", "prompt=question"]),
        (["--fields", "prompt=a", "prompt=b"], ["--fields has 'prompt=b'", "once"]),
        (["--fields", "promt=a"], ["'promt' is no field"]),
        (["--roles", "bot"], ["--roles has 'bot'", "give each role", "bot=assistant"]),
        (["--roles", "assistant=bot"], ["source.roles is {'assistant': 'bot'}", "as {bot: assistant}"]),
        (["--template-date", "today"], ["data.template_date is 'today'", "2026-01-31"]),
        (
            ["--template-kwargs", "{tools: 1}"],
            ["data.template_kwargs is {'tools': 1}", "add_generation_prompt"],
        ),
        (["--output", "."], ["has no name", "prepared/code"]),
        (["--template", "llama"], ["'llama' is unknown", "vicuna"]),
        (["--strict"], ["rows.jsonl:2: ", "strict"]),
        (["--probe", "9"], ["9 different examples were to be held out", "hold out fewer"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tokenizer_dir: Path,
    flags: list[str],
    parts: list[str],
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [sharegpt("a", "b"), "{", sharegpt("c", "d")])
    argv = ["prepare", "--input", str(path), "--output", str(tmp_path / "source")]
    argv += ["--tokenizer", str(tokenizer_dir), *([] if "--template" in flags else ["--template", "vicuna"])]
    assert main([*argv, *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(part in said for part in parts), said
    assert not list(tmp_path.glob("source*"))


def test_one_source_with_probe_and_split(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer_dir: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", varied_rows(6))
    write_jsonl(tmp_path / "b.jsonl", varied_rows(6, seed=1))
    argv = ["prepare", "--input", str(tmp_path / "*.jsonl"), "--output", str(tmp_path / "out/source")]
    argv += ["--tokenizer", str(tokenizer_dir), "--probe", "2", "--overlong", "split", "--seq-length", "60"]
    assert main(argv) == 0
    report = load_report(tmp_path / "out/source")
    assert (report.rows, report.held_out, report.recipe.split_length) == (12, 2, 60)
    assert report.split > 0
    assert "source (probe)" in capsys.readouterr().out


ASKED = [{"q": "two plus two", "a": "four"}, {"q": "hello " * 50, "a": "good " * 50}]


def test_files_are_prepared_with_what_a_run_yaml_can_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer_dir: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    path, prefix = write_jsonl(tmp_path / "rows.jsonl", ASKED), tmp_path / "source"
    argv = ["prepare", "--input", str(path), "--output", str(prefix), "--tokenizer", str(tokenizer_dir)]
    argv += ["--fields", "prompt=q", "completion=a", "--format", "prompt-completion", "--trust-remote-code"]
    argv += ["--template", str(template), "--train-on", "last", "--workers", "1"]
    assert main([*argv, "--seq-length", "90"]) == 0
    report = load_report(prefix)
    assert (report.examples, report.recipe.fields) == (2, {"prompt": "q", "completion": "a"})
    assert report.recipe.template.startswith("jinja:") and report.recipe.template.endswith("/last")
    table = capsys.readouterr().out.split("--seq-length 90 --overlong drop")[1]
    assert "WARNING: 50% of the examples of source are longer" in table
    assert main([*argv, "--seq-length", "90", "--overlong", "error"]) == 2
    assert "1 of 2 examples are longer than seq_length 90" in capsys.readouterr().err


def test_what_rows_hold_and_a_folder_is_told_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer_dir: Path
) -> None:
    row = {
        "messages": [{"role": "Ann", "content": "two"}, {"role": "assistant", "content": "four", "weight": 1}]
    }
    rows = [{**row, "images": ["a"]}, row, {**row, "images": ["b"], "id": 3}, {"text": "<|im_start|>"}]
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    path = write_jsonl(folder / "rows.jsonl", rows)
    (folder / "more.csv").write_text("a,b\n")
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ strftime_now('%d') if dated }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    argv = ["prepare", "--input", str(folder), "--output", str(tmp_path / "source"), "--workers", "1"]
    argv += ["--tokenizer", str(tokenizer_dir), "--template", str(template), "--roles", "Ann=user"]
    argv += ["--template-date", "2026-01-31", "--template-kwargs", "{dated: true}"]
    for _ in range(2):  # prepared, then found
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert said.count(f"source: unused key images (pictures) in 2 rows (first: {path}:1): ") == 1
        assert said.count(f"source: unknown key id in 1 row (first: {path}:3): ") == 1
        assert said.count(f"source: not read: {folder}/more/, {folder}/more.csv: no names that rows are") == 1
        assert said.count(f"  broken: {path}:4: ") == 1
    report = load_report(tmp_path / "source")
    assert (report.examples, report.broken, report.recipe.roles) == (3, 1, {"Ann": "user"})
    assert report.recipe.template.endswith('/{"dated": true}/2026-01-31')
    (folder / "more.csv").unlink()
    assert main(argv) == 0
    assert f"not read: {folder}/more/: no names" in capsys.readouterr().out
    assert main([*argv, "--template-date", "2026-02-01"]) == 0
    assert load_report(tmp_path / "source").fingerprint != report.fingerprint


def test_input_is_not_written_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer_dir: Path
) -> None:
    source = tmp_path / "code.json"
    source.write_text(json.dumps(varied_rows(3)))
    before = source.read_bytes()
    argv = ["prepare", "--output", str(tmp_path / "code"), "--tokenizer", str(tokenizer_dir), "--input"]
    assert main([*argv, str(source)]) == 2
    assert "code.json: rows are read from it, and" in capsys.readouterr().err
    other = write_jsonl(tmp_path / "code.jsonl", varied_rows(3))
    assert main([*argv, str(other)]) == 2
    assert (
        "code.json: is no report of a prepared source, and would be written over" in capsys.readouterr().err
    )
    assert source.read_bytes() == before
    source.write_bytes(b'{\n  "na')  # a report that a crash has cut off
    assert main([*argv, str(other)]) == 0


@pytest.mark.parametrize(
    "flag", [["--format", "text"], ["--fields", "text=body"], ["--roles", "bot=assistant"]]
)
def test_what_each_source_says_is_no_flag_beside_a_run_yaml(
    capsys: pytest.CaptureFixture[str], run_yaml: Path, flag: list[str]
) -> None:
    assert main(["prepare", str(run_yaml), *flag]) == 2
    assert f"{flag[0]} is for --input; in RUN.yaml each source has its own" in capsys.readouterr().err


def test_an_interrupt_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_command, "_prepare_files", interrupt)
    assert main(["prepare"]) == 130
    assert "interrupted; nothing half-written is left" in capsys.readouterr().err


def test_a_source_of_which_no_row_results_is_refused_as_train_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_yaml: Path
) -> None:
    said = []
    for command in (["prepare"], ["train", "--run-dir", str(tmp_path / "run")]):
        flags = ["--seq-length", "8", "--strategy", "uniform", "--expert-model-parallel-size", "1"]
        assert main([*command, str(run_yaml), *flags]) == 2
        said.append(capsys.readouterr().err)
    assert "no row results" in said[0] and said[0] == said[1]
