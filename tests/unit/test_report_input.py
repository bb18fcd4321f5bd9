"""`report` on what is half there, broken, or no run at all."""

import pytest
from report_fixtures import change, write_run

from megatron_dynmix.cli import main
from megatron_dynmix.report.pages import page_of_run, page_of_runs
from megatron_dynmix.report.run import read_run


def page_of(run_dir) -> str:
    assert main(["report", str(run_dir)]) == 0
    return (run_dir / "report.html").read_text()


def cut(path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def test_an_empty_directory_is_said_to_be_empty(tmp_path):
    page = page_of(tmp_path)
    assert "The directory is empty" in page and "No iteration is on record" in page


@pytest.mark.parametrize("name", ["config.yaml", "mixing.jsonl", "metrics.jsonl", "ledger.jsonl"])
def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path, capsys, name):
    run_dir = write_run(tmp_path / "mine")
    (run_dir / name).unlink()
    page = page_of(run_dir)
    assert f"{name} is missing" in page and f"{name} is missing" in capsys.readouterr().out
    assert 'data-chart="weights"' in page
    assert ('data-chart="delta"' in page) == (name != "mixing.jsonl")
    assert ('data-chart="throughput"' in page) == (name != "metrics.jsonl")


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints"])
def test_a_run_that_died_at_its_start_has_a_page(tmp_path, name):
    (tmp_path / name).mkdir() if name == "checkpoints" else (tmp_path / name).write_text("training: {}\n")
    assert "metrics.jsonl is missing" in page_of(tmp_path)


@pytest.mark.parametrize("name", ["mixing.jsonl", "metrics.jsonl", "ledger.jsonl"])
def test_a_last_line_cut_short_is_left_out_and_said(tmp_path, name):
    run_dir = write_run(tmp_path / "mine")
    cut(run_dir / name, 0.97)
    page = page_of(run_dir)
    assert f"{name}: line" in page and "is incomplete" in page
    assert 'data-chart="weights"' in page


@pytest.mark.parametrize("name", ["mixing.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize(
    "line", [b"{broken", b"[1, 2]", b'{"loss": 2.0}', b'{"iteration": "7"}', b"", b"\xff"]
)
def test_a_broken_line_is_named_and_costs_no_other(tmp_path, name, line):
    run_dir = write_run(tmp_path / "mine")
    lines = (run_dir / name).read_bytes().splitlines()
    lines[3] = line
    (run_dir / name).write_bytes(b"\n".join(lines) + b"\n")
    run = read_run(run_dir)
    assert run.missing == [f"{name}: line 4 is no record with an iteration; left out"]
    assert {len(run.metrics), len(run.updates)} == {9, 10} and run.is_finished


ODD = [[[1, 2], [3]], "many", None, [], {}, 3, [None] * 4, ["NaN"] * 4, [True] * 4, {"chat": "Infinity"}]
KEYS = {
    "mixing.jsonl": [
        *("sources", "old_weights", "new_weights", "delta", "load", "distance", "epochs", "events", "notes"),
        *("seconds", "entropy", "kl_step", "delta_error"),
    ],
    "metrics.jsonl": ["lm_loss", "source_loss", "tokens", "seconds", "skipped_iterations"],
    "ledger.jsonl": ["sources", "weights", "why", "kind"],
}


CASES = [(name, key) for name, keys in KEYS.items() for key in keys]


def set_twice(path, key, value) -> None:
    for place in range(2):
        change(path, place, **{key: value})


@pytest.mark.parametrize(("name", "key"), CASES)
def test_records_of_another_version_do_not_end_the_report(tmp_path, name, key):
    sound = write_run(tmp_path / "mine", updates=2, experts=4)
    records = (sound / name).read_bytes()
    for value in ODD[:2]:
        (sound / name).write_bytes(records)
        set_twice(sound / name, key, value)
        page = page_of_run(read_run(sound), now=0.0)
        assert "loss" in [chart.id for chart in page.charts] or name == "metrics.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), CASES)
def test_records_with_any_value_do_not_end_a_report_or_a_comparison(tmp_path, name, key):
    other = read_run(write_run(tmp_path / "other", updates=1, experts=4))
    sound = write_run(tmp_path / "mine", updates=2, experts=4)
    records = (sound / name).read_bytes()
    for value in ODD:
        (sound / name).write_bytes(records)
        set_twice(sound / name, key, value)
        run = read_run(sound)
        for chart in page_of_run(run, now=0.0).charts:
            chart.figure.to_json()
        page_of_runs([run, other], now=0.0)


def test_records_without_weights_are_counted(tmp_path):
    run_dir = write_run(tmp_path / "mine", updates=3)
    change(run_dir / "mixing.jsonl", 1, new_weights=None)
    assert "1 records, as of another version, have no weight for each source" in page_of(run_dir)


@pytest.mark.parametrize(
    "text", ["- a\n", "a: [", "\x00", "mixing: 3\n", "", "training: {train_iters: soon}\n"]
)
def test_a_configuration_that_is_none_is_said(tmp_path, text):
    run_dir = write_run(tmp_path / "mine")
    (run_dir / "config.yaml").write_text(text)
    page = page_of(run_dir)
    assert "config.yaml" in page and "how far it is to go is not known" in page


def test_the_page_of_a_run_that_is_being_written_needs_no_end(tmp_path):
    run_dir = write_run(tmp_path / "mine", train_iters=1000)
    page = page_of(run_dir)
    assert "It is at iteration 100 of 1,000 (10%)" in page and "may still be running" in page


def refused(capsys, *argv) -> str:
    assert main(["report", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert "is not there; give the --run-dir" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    assert "is a file" in refused(capsys, tmp_path / "notes.txt")
    message = refused(capsys, tmp_path)
    assert "is no run directory: it holds notes.txt" in message
    assert not (tmp_path / "report.html").exists()


def test_a_folder_of_runs_is_refused_with_their_names(tmp_path, capsys):
    run_dir = write_run(tmp_path / "mine", updates=1)
    assert f"give the --run-dir of a run, such as {run_dir}" in refused(capsys, tmp_path)


def test_the_page_of_an_empty_directory_can_be_made_again(tmp_path, capsys):
    for _ in range(2):
        assert main(["report", str(tmp_path)]) == 0
        assert "has not begun to write" in capsys.readouterr().out


def test_one_run_twice_is_refused(tmp_path, capsys):
    run_dir = write_run(tmp_path / "mine", updates=1)
    assert "given twice" in refused(capsys, run_dir, tmp_path / "." / "mine")


def test_a_page_that_cannot_be_written_is_refused(tmp_path, capsys):
    run_dir = write_run(tmp_path / "mine", updates=1)
    (tmp_path / "file").write_text("x")
    message = refused(capsys, run_dir, "--output", tmp_path / "file" / "page.html")
    assert "cannot be written" in message and "--output" in message


def test_the_page_goes_where_it_is_wanted(tmp_path):
    run_dir = write_run(tmp_path / "mine", updates=1)
    assert main(["report", str(run_dir), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").is_file() and not (run_dir / "report.html").exists()
