"""An exported model in lm-evaluation-harness, with tasks of our own and no network.

Skipped where the harness is not installed (the `evaluate` extra).
"""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dynmix.cli import main
from megatron_dynmix.compare.benchmarks import benchmarks_of
from megatron_dynmix.compare.harness import answered
from megatron_dynmix.data.tokenizer.fast import train_bpe

HARNESS = importlib.util.find_spec("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(HARNESS is None, reason="lm_eval is not installed")]
ROOT = Path(__file__).parents[2]
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


def test_the_harness_reads_an_exported_model_as_transformers_does(exported, tasks, tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    more = {"device": "cpu", "batch_size": 4, "log_samples": True, "model_args": {"dtype": "float32"}}
    request = {
        "model": str(exported),
        "tasks": ["local_choice", "local_answer"],
        "shots": 0,
        "include_path": [str(tasks)],
        "arguments": more,
    }
    results = answered(request)["results"]
    model, tokenizer = loaded(exported)
    expected = [
        [log_likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        for row in DOCS
    ]
    right = sum(first > second for first, second in expected)
    assert results["local_choice"]["acc,none"] == right / len(DOCS)
    answers = [greedy_answer(model, tokenizer, row["question"]) for row in DOCS]
    same = sum(a == row["choices"][0] for a, row in zip(answers, DOCS, strict=True))
    assert results["local_answer"]["exact_match,none"] == same / len(DOCS)
    refused = answered({**request, "tasks": ["local_chioce"]})
    assert "there is no local_chioce in lm-evaluation-harness" in refused["refused"]


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


def test_the_papers_tasks_are_in_the_harness():
    """Read from its files: to ask it takes half a minute."""
    tasks = Path(HARNESS.submodule_search_locations[0]) / "tasks"
    known = set()
    for folder in ("mmlu/default", "bbh/fewshot", "gsm8k", "arc", "super_glue/boolq"):
        for path in (tasks / folder).glob("*.yaml"):
            known |= set(re.findall(r"^(?:task|group): (\S+)$", path.read_text(), re.MULTILINE))
    asked = benchmarks_of(str(ROOT / "examples/paper/TASKS.yaml"), [], "{}").by_shots
    assert asked == {
        5: ["mmlu"],
        3: ["bbh_fewshot"],
        8: ["gsm8k_cot"],
        0: ["arc_easy", "arc_challenge", "boolq"],
    }
    assert {task for tasks in asked.values() for task in tasks} <= known
