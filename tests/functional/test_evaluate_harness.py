"""An exported model in lm-evaluation-harness: the example's script, with tasks of our own and no network.

Skipped where the harness is not installed (the `evaluate` extra).
"""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dynmix.cli import main
from megatron_dynmix.data.tokenizer.fast import train_bpe

HARNESS = importlib.util.find_spec("lm_eval")
pytestmark = pytest.mark.skipif(HARNESS is None, reason="lm_eval is not installed")
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/evaluate"
DOCS = [
    {
        "question": f"USER: What is {a} + {b}? ASSISTANT:",
        "choices": [f" {a + b}", f" {a * b + 20}"],
        "gold": 0,
    }
    for a, b in [(2, 3), (7, 4), (5, 9), (8, 8), (6, 1), (3, 3), (9, 5), (4, 2)]
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny Mixtral that went to Megatron and back."""
    folder = tmp_path_factory.mktemp("evaluate")
    train_bpe([row["question"] for row in DOCS], 320, folder / "tokenizer")
    make = runpy.run_path(str(ROOT / "tools/tiny_mixtral.py"))["main"]
    assert make(["--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "hf")]) == 0
    there, back = (str(folder / name) for name in ("megatron", "back"))
    assert main(["convert", "hf-to-megatron", str(folder / "hf"), there]) == 0
    assert main(["convert", "megatron-to-hf", there, back]) == 0
    return folder / "back"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A multiple-choice task and one of greedy answers, from a local file of rows."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOCS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    answer = {
        "task": "local_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, answer):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


@pytest.mark.slow
def test_the_harness_reads_an_exported_model_as_transformers_does(exported, tasks, tmp_path):
    caches = {name: str(tmp_path / name) for name in ("HF_HOME", "HF_DATASETS_CACHE")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    here = {"DEVICE": "cpu", "DTYPE": "float32", "BATCH_SIZE": "4", "OMP_NUM_THREADS": "1"}
    program = {"LM_EVAL": str(Path(sys.executable).parent / "lm_eval"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [
            *(EXAMPLE / "task.sh", exported, tmp_path / "out", "0", "local_choice,local_answer"),
            *("--include_path", tasks),
        ],
        env={**os.environ, **caches, **offline, **here, **program},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    model, tokenizer = loaded(exported)
    right = 0
    for sample in samples(tmp_path / "out", "local_choice"):
        prompt, choices = sample["doc"]["question"], sample["doc"]["choices"]
        expected = [log_likelihood(model, tokenizer, prompt, choice) for choice in choices]
        assert [float(value) for value, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-4)
        right += expected[0] > expected[1]
    assert results["local_choice"]["acc,none"] == right / len(DOCS)
    assert results["local_answer"]["exact_match,none"] == 0.0  # a model that has learnt nothing
    answers = samples(tmp_path / "out", "local_answer")
    assert len(answers) == len(DOCS)
    for answer in answers:
        assert answer["resps"][0][0] == greedy_answer(model, tokenizer, answer["doc"]["question"])


def samples(output, task):
    (path,) = output.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def log_likelihood(model, tokenizer, prompt, continuation):
    """Log probability of a continuation, summed over its tokens."""
    first = len(tokenizer(prompt)["input_ids"])
    tokens = torch.tensor([tokenizer(prompt + continuation)["input_ids"]])
    with torch.no_grad():
        log_probs = model(tokens).logits.log_softmax(-1)
    return float(log_probs[0, first - 1 : -1].gather(1, tokens[0, first:, None]).sum())


def greedy_answer(model, tokenizer, question):
    tokens = torch.tensor([tokenizer(question)["input_ids"]])
    made = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True).split("\n")[0]


def test_the_table_has_the_papers_numbers(tmp_path):
    results = {
        "mmlu": {"acc,none": 0.25},
        "bbh_fewshot": {"exact_match,none": 0.3},
        "gsm8k_cot": {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2},
        "arc_easy": {"acc,none": 0.1, "acc_norm,none": 0.5},
        "arc_challenge": {"acc,none": 0.1, "acc_norm,none": 0.4},
        "boolq": {"acc,none": 0.6},
    }
    for model, left_out in (("dynamic", None), ("uniform", "boolq")):
        for task, metrics in results.items():
            if task != left_out:
                path = tmp_path / model / task / "results_2026-01-01T00-00-00.json"
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps({"results": {task: metrics}}))
    newer = tmp_path / "dynamic/mmlu/results_2026-01-02T00-00-00.json"
    newer.write_text(json.dumps({"results": {"mmlu": {"acc,none": 0.26}}}))
    table = [sys.executable, EXAMPLE / "table.py", tmp_path / "dynamic", tmp_path / "uniform"]
    lines = subprocess.run(table, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[2:] == [
        "| dynamic | 26.00 | 30.00 | 10.00 | 50.00 |",
        "| uniform | 25.00 | 30.00 | 10.00 | - |",
    ]


def test_the_papers_tasks_are_in_the_harness():
    """Read from its files: to ask it takes half a minute."""
    tasks = Path(HARNESS.submodule_search_locations[0]) / "tasks"
    known = set()
    for folder in ("mmlu/default", "bbh/fewshot", "gsm8k", "arc", "super_glue/boolq"):
        for path in (tasks / folder).glob("*.yaml"):
            known |= set(re.findall(r"^(?:task|group): (\S+)$", path.read_text(), re.MULTILINE))
    asked = set(re.findall(r"\d (\S+) \"\$", (EXAMPLE / "paper.sh").read_text()))
    assert asked == {"mmlu", "bbh_fewshot", "gsm8k_cot", "arc_easy,arc_challenge,boolq"}
    assert {task for tasks in asked for task in tasks.split(",")} <= known
