"""Tasks of lm-evaluation-harness, which has a stand-in here: what is asked, scored, and refused."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from test_compare_results import SOURCES, cell

from megatron_dynmix.cli import main
from megatron_dynmix.compare import asking, harness
from megatron_dynmix.compare.asking import answer
from megatron_dynmix.compare.benchmarks import AVERAGE, Answers, are_known, benchmarks_of, scores_of
from megatron_dynmix.compare.page import comparison_tables
from megatron_dynmix.compare.results import TASK, compared
from megatron_dynmix.errors import CommandFailed, InputError
from megatron_dynmix.report.tables import Bold

PAPER = """
MMLU: {tasks: [mmlu], shots: 5}
QA: {tasks: {arc_easy: acc_norm, boolq: acc}, shots: 0}
GSM8K: {tasks: {gsm8k_cot: "exact_match,strict-match"}, shots: 8}
MBPP: imported
"""
METRICS = {
    "mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.01},
    "arc_easy": {"alias": "arc_easy", "acc,none": 0.1, "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A"},
    "boolq": {"sample_len": 8, "acc,none": 0.7},
    "gsm8k_cot": {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2},
}


@pytest.fixture
def lm_eval(monkeypatch):
    """What is used of the harness, and what it was told."""
    told = []

    def simple_evaluate(
        model, model_args=None, tasks=None, num_fewshot=None, batch_size=None, limit=None, task_manager=None,
        log_samples=True, device="cuda",
    ):  # fmt: skip
        told.append((model_args, tuple(tasks), num_fewshot, batch_size, limit, log_samples))
        if "boolq" in tasks and limit == 13:
            raise ConnectionError("no data set")
        return {"results": {task: METRICS[task] for task in tasks if task != "mmlu"}, "groups": METRICS}

    class TaskManager:
        def __init__(self, include_path=None, include_defaults=True):
            self.all_tasks = [
                *(METRICS if include_defaults else []),
                *(["own"] if include_path else []),
                "arc",
            ]
            self.all_tags = ["arc"]

    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate, package.tasks, tasks.TaskManager = simple_evaluate, tasks, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr(harness, "answered", answer)  # not in a process of its own
    monkeypatch.setattr(harness, "_check_installed", lambda benchmarks: None)
    monkeypatch.setattr(harness, "checkpoint_of", lambda run_dir: run_dir / "checkpoints/iter_0000004")
    state = SimpleNamespace(progress=SimpleNamespace(iteration=4))
    monkeypatch.setattr(harness, "read_run_state", lambda folder: state)
    monkeypatch.setattr(harness, "_exported", lambda run_dir, *rest: run_dir / "hf")
    return told


@pytest.fixture
def paper(tmp_path):
    path = tmp_path / "TASKS.yaml"
    path.write_text(PAPER)
    return benchmarks_of(str(path), [], "{batch_size: 2}")


def answers_of(benchmarks, run_dir):
    return harness.ask(run_dir, benchmarks, print)


def test_each_task_is_asked_once_with_its_shots_and_no_more(lm_eval, paper, tmp_path):
    answers = answers_of(paper, tmp_path)
    model = {"pretrained": str(tmp_path / "hf")}
    assert lm_eval == [
        (model, ("mmlu",), 5, 2, None, False),
        (model, ("arc_easy", "boolq"), 0, 2, None, False),
        (model, ("gsm8k_cot",), 8, 2, None, False),
    ]
    assert Answers.read(tmp_path, 4, {"batch_size": 2}) == answers and are_known(paper, answers)
    assert answers.results["arc_easy, 0 shots"] == {"acc,none": 0.1, "acc_norm,none": 0.5}
    answers_of(paper, tmp_path)
    assert len(lm_eval) == 3, "all was asked before"
    assert Answers.read(tmp_path, 5, {"batch_size": 2}) is None, "of an earlier iteration"
    assert Answers.read(tmp_path, 4, {"batch_size": 1}) is None, "asked in another way"


def test_what_was_asked_is_kept_when_the_next_fails(lm_eval, paper, tmp_path):
    some = replace(paper, arguments={"limit": 13})
    with pytest.raises(CommandFailed, match="cannot ask arc_easy, boolq: ConnectionError: no data set"):
        answers_of(some, tmp_path)
    kept = Answers.read(tmp_path, 4, {"limit": 13})
    assert list(kept.results) == ["mmlu, 5 shots"] and not are_known(some, kept)
    assert scores_of(some, kept, tmp_path) == {"MMLU": 25.0}


def test_scores_are_means_over_a_columns_tasks_in_percent_beside_imported_ones(lm_eval, paper, tmp_path):
    answers = answers_of(paper, tmp_path)
    columns = {"MMLU": 25.0, "QA": pytest.approx(60.0), "GSM8K": 10.0}
    assert scores_of(paper, answers, tmp_path) == columns, "no average while one is missing"
    (tmp_path / "scores.json").write_text('{"MT-Bench": 5.25, "MBPP": 15}')
    found = scores_of(paper, answers, tmp_path)
    assert found == {**columns, "MBPP": 15.0, AVERAGE: pytest.approx(27.5), "MT-Bench": 5.25}
    assert list(found) == ["MMLU", "QA", "GSM8K", "MBPP", AVERAGE, "MT-Bench"]
    (tmp_path / "scores.json").write_text('{"MBPP": "many"}')
    with pytest.raises(InputError, match=r"scores.json holds .* it must hold numbers by name"):
        scores_of(paper, answers, tmp_path)


def test_names_are_columns_of_their_own_with_the_first_metric(lm_eval, tmp_path):
    named = benchmarks_of("gsm8k_cot,boolq", [], "{}")
    answers = answers_of(named, tmp_path)
    assert [told[2] for told in lm_eval] == [None]
    assert scores_of(named, answers, tmp_path) == {"gsm8k_cot": 10.0, "boolq": 70.0, AVERAGE: 40.0}


@pytest.mark.parametrize(
    "tasks, complaint",
    [
        (
            {"gsm8k_cot": "exact_match"},
            "no one metric exact_match; there are exact_match,strict-match, exact_",
        ),
        ({"boolq": "acc_norm"}, "no one metric acc_norm; there are acc,none"),
        ({"loud": None}, "ppl,none is 31.5, no share that has a percentage"),
    ],
)
def test_a_metric_that_is_no_score_is_refused(lm_eval, tmp_path, tasks, complaint, monkeypatch):
    monkeypatch.setitem(METRICS, "loud", {"ppl,none": 31.5})
    path = tmp_path / "TASKS.yaml"
    path.write_text(json.dumps({"It": {"tasks": tasks}}))
    benchmarks = benchmarks_of(str(path), [], "{}")
    with pytest.raises(InputError, match=complaint):
        scores_of(benchmarks, answers_of(benchmarks, tmp_path), tmp_path)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("[]", "must hold columns by name"),
        ("a: [b", "cannot be read as YAML"),
        ("MMLU: mmlu", "MMLU holds 'mmlu'; give {tasks"),
        ("MMLU: {tasks: []}", "MMLU holds"),
        ("MMLU: {tasks: [mmlu], shot: 5}", "MMLU holds"),
        ("MMLU: {tasks: [mmlu], shots: -1}", "MMLU holds"),
        ("MMLU: {tasks: {mmlu: 3}}", "MMLU holds"),
    ],
)
def test_task_files_that_cannot_be_used(tmp_path, content, complaint):
    path = tmp_path / "TASKS.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint):
        benchmarks_of(str(path), [], "{}")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("--tasks", "mmul"), "there is no mmul in lm-evaluation-harness"),
        (("--tasks", "arc"), "arc stands for several tasks without a score of its own"),
        (("--tasks", "mmlu,"), "--tasks is 'mmlu,'; give names"),
        (("--tasks", "no.yaml"), "no.yaml cannot be read"),
        (("--tasks", "mmlu", "--include-path", "nowhere"), "nowhere: there is no such folder"),
        (("--tasks", "mmlu", "--harness", "16"), "--harness is '16'; give a mapping"),
        (("--tasks", "mmlu", "--harness", "{batch: 16}"), "no argument batch; it has model_args, batch_size"),
        (("--tasks", "mmlu", "--harness", "{tasks: []}"), "no argument tasks"),
        (("--tasks", "mmlu", "--harness", "{model_args: a=b}"), "model_args must be a mapping"),
        (("--harness", "{limit: 3}"), "give --tasks, too"),
    ],
)
@pytest.mark.parametrize(
    "command", [["compare", "RUN.yaml", "--strategies", "uniform", "--seeds", "1", "--output"], ["evaluate"]]
)
def test_tasks_that_cannot_be_asked_are_one_message(lm_eval, tmp_path, capsys, command, flags, complaint):
    assert main([*command, str(tmp_path / "run"), *flags]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_harness_that_dies_is_said(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert harness.answered({}) == {"failed": "its process ended with exit code 1"}


def test_without_the_harness_there_are_no_tasks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert main(["evaluate", str(tmp_path), "--tasks", "mmlu"]) == 2
    assert "pip install 'megatron-dynmix[evaluate]'" in capsys.readouterr().err


def test_own_tasks_do_not_wait_for_those_of_the_harness(lm_eval, tmp_path):
    assert "mmlu" not in asking._task_manager([tmp_path], ["own"]).all_tasks
    assert "mmlu" in asking._task_manager([tmp_path], ["own", "mmlu"]).all_tasks


def test_the_flags_of_a_cell_ask_the_same(tmp_path):
    given = benchmarks_of("mmlu,boolq", [tmp_path], "{limit: 3, model_args: {dtype: float32}}")
    flags = given.flags
    assert flags[:4] == ["--tasks", "mmlu,boolq", "--include-path", str(tmp_path)]
    assert benchmarks_of(flags[1], [tmp_path], flags[5]) == given


def test_tables_have_every_score_and_its_paired_difference():
    cells = [
        replace(found, metrics={**found.metrics, f"{TASK}MMLU": 30 + seed + gain, f"{TASK}{AVERAGE}": 20.0})
        for name, gain in (("uniform", 0), ("gate-load", 2))
        for seed in (1, 2, 3)
        for found in [cell(name, seed, 2, 3)]
    ]
    cells[3].metrics.pop(f"{TASK}{AVERAGE}")
    tables = comparison_tables(compared(["uniform", "gate-load"], SOURCES, cells, []))
    assert tables["tasks"].header == ["variant", "MMLU", AVERAGE]
    assert tables["tasks"].rows == [
        ["uniform", "32.00 ± 1.00", "20.00 ± 0.00"],
        ["gate-load", "34.00 ± 1.00", "-"],
    ]
    assert tables["task-differences"].rows == [["gate-load", Bold("+2.00 [+2.00, +2.00]"), "-"]]
    plain = [cell("uniform", 1, 2, 3)]
    assert "tasks" not in comparison_tables(compared(["uniform"], SOURCES, plain, []))
