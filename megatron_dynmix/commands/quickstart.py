"""The command `quickstart`: four generated sources, a tokenizer, and a `RUN.yaml` that trains a tiny MoE.

The sources hold small instruction examples that can be learned. `math` and `math_again` share one generator:
they are redundant on purpose, and a strategy that sees redundancy gives both together the share of one.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import yaml

from megatron_dynmix.commands.train import train
from megatron_dynmix.errors import InputError
from megatron_dynmix.lease import LOCK, Lease

# ruff: noqa: SIM905 (a list of words reads best as words)

TRAIN_EXAMPLES = 1500
PROBE_EXAMPLES = 100
VOCAB_SIZE = 1024
SEQ_LENGTH = 128
TEMPLATE: Final = "vicuna"

Turns = list[str]
"""human, gpt, human, gpt, ..."""
Source = dict[str, Path]
"""`{"train": path, "probe": path}`"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the first run is written."""
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))


def run(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Generate, prepare, train, and say what to open."""
    from megatron_dynmix import platform

    ranks = platform.most_ranks(2)
    flags = ["--expert-model-parallel-size", "1"] if ranks == 1 else []
    from megatron_dynmix.training.holding import lease_of
    from megatron_dynmix.training.resume import check_run_dir

    run_dir = arguments.run_dir
    lease_of(run_dir).refuse_if_held()
    check_run_dir(run_dir, "no")
    data = run_dir / "data"
    with Lease(data / LOCK, "a quickstart", "give another --run-dir").take(say=print):
        run_yaml = make_quickstart(data)
        code = train(run_yaml, flags, run_dir, world_size=ranks)
    if code == 0:
        print(
            f"\nDone. What to open:\n"
            f"  {_command('megatron-dynmix')} report {run_dir}    explains the run: {run_dir}/report.html\n"
            f"  {run_dir}/mixing.jsonl    every weight update: loads, distances, old and new weights\n"
            f"  {run_dir}/metrics.jsonl   loss of each source over time\n"
            f"  {_command('tensorboard')} --logdir {run_dir}/tensorboard\n"
            f"  {run_yaml}    the run: change it and train again:\n"
            f"  {' '.join([_command('megatron-dynmix'), 'train', str(run_yaml), *flags])} "
            f"--run-dir runs/mine --nproc-per-node {ranks}"
        )
    return code


def _command(name: str) -> str:
    """Return how to call a program that was installed beside this one, from here."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def make_quickstart(directory: Path, seed: int = 1234) -> Path:
    """Write sources, tokenizer and `RUN.yaml` into `directory`, and return the path of `RUN.yaml`."""
    sources = write_sources(directory, seed)
    _train_tokenizer([source["train"] for source in sources.values()], directory / "tokenizer")
    return write_run_yaml(directory, sources, seed=seed)


def write_sources(directory: Path, seed: int) -> dict[str, Source]:
    """Generate the four sources as ShareGPT JSONL files in `directory`, byte-identical for one seed.

    No conversation occurs twice, within a file or between files, so a probe never measures what was trained
    on. Raises `InputError` where a file of that name holds something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    count = TRAIN_EXAMPLES + PROBE_EXAMPLES
    sources = {}
    for name, generate in GENERATORS.items():
        rng = random.Random(f"{seed}/{name}")
        lines = [_example_line(f"{name}:{i}", _draw_new(generate, rng, seen), rng) for i in range(count)]
        source = {"train": directory / f"{name}.jsonl", "probe": directory / f"{name}.probe.jsonl"}
        _write_once(source["train"], "".join(lines[:TRAIN_EXAMPLES]))
        _write_once(source["probe"], "".join(lines[TRAIN_EXAMPLES:]))
        sources[name] = source
    return sources


def _draw_new(generate: Callable[[random.Random], Turns], rng: random.Random, seen: set[str]) -> Turns:
    """Draw a new conversation; the generators hold many times the examples needed."""
    for _ in range(1000):
        turns = generate(rng)
        key = "\n".join(turns)
        if key not in seen:
            seen.add(key)
            return turns
    raise AssertionError(f"{generate.__name__} has too few different examples")


def _example_line(example_id: str, turns: Sequence[str], rng: random.Random) -> str:
    """Return one ShareGPT JSONL line; some chat examples carry a system prompt, as real ones do."""
    example: dict[str, object] = {"id": example_id}
    if example_id.startswith("chat:") and rng.random() < 0.3:
        example["system_prompt"] = SYSTEM_PROMPT
    speakers = ("human", "gpt")
    example["conversations"] = [{"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return json.dumps(example, ensure_ascii=False) + "\n"


def write_run_yaml(directory: Path, sources: Mapping[str, Source], *, seed: int = 1234) -> Path:
    """Write `RUN.yaml` into `directory`: a tiny MoE on two expert-parallel ranks, equal starting weights.

    Paths are relative to `directory`, so that the folder can be moved.
    """
    relative = {
        name: {kind: Path(os.path.relpath(path, directory)).as_posix() for kind, path in source.items()}
        for name, source in sources.items()
    }
    run = {
        "model": {"preset": "tiny", "vocab_size": VOCAB_SIZE},
        "parallel": {"expert_model_parallel_size": 2},
        "data": {
            "tokenizer": "tokenizer",
            "template": TEMPLATE,
            "seq_length": SEQ_LENGTH,
            "num_workers": 0,  # reading is quick, and the ranks need both cores
            "sources": {
                name: {"path": source["train"], "probe": source["probe"], "weight": 1 / len(sources)}
                for name, source in relative.items()
            },
        },
        "mixing": {"strategy": "uniqueness", "interval": 10, "signal": "train"},
        "training": {"train_iters": 100, "micro_batch_size": 8, "global_batch_size": 32, "seed": seed},
        "optimizer": {"lr": 3.0e-3, "lr_decay_style": "cosine", "lr_warmup_iters": 5},
        "checkpoint": {"save_interval": 50},
        "logging": {"log_interval": 5},
    }
    path = directory / "RUN.yaml"
    _write_once(path, yaml.safe_dump(run, sort_keys=False, default_flow_style=None, width=110))
    return path


def _train_tokenizer(files: Iterable[Path], output_dir: Path) -> None:
    """Train the tokenizer on the texts that the run will see, the template's own words included.

    Without those words the template alone would take more than half of a row.
    """
    # here, not above: they bring in transformers, which takes seconds and which generating text does not need
    from megatron_dynmix.data.prepare.formats import parse_sharegpt
    from megatron_dynmix.data.prepare.template import Renderer
    from megatron_dynmix.data.tokenizer.fast import train_bpe

    bytes_only = train_bpe([], VOCAB_SIZE, output_dir)
    renderer = Renderer(bytes_only, TEMPLATE)
    rows = (json.loads(line) for path in files for line in path.read_bytes().splitlines())
    rendered = (renderer.render(parse_sharegpt(row)).text for row in rows)
    # the end token has its id already, no merge shall be spent on its letters
    train_bpe((text.replace(bytes_only.eos, "") for text in rendered), VOCAB_SIZE, output_dir)


def _write_once(path: Path, text: str) -> None:
    """Write a file unless it is there already with this content; an edited file is never overwritten."""
    data = text.encode()  # bytes: a platform's line ends would break "byte-identical for one seed"
    if not path.exists():
        path.write_bytes(data)
    elif path.read_bytes() != data:
        raise InputError(
            f"{path} exists and is not what quickstart writes here (edited, or made with another seed or "
            "version). Remove it, or choose another directory."
        )


# ---- the examples of each source

NAMES = "Anna Ben Clara David Emma Felix Grace Hugo Ida Jonas Kira Leon Maya Noah Olga Paul Rosa Sam".split()
GREETINGS = ["Hello,", "Good morning,", "Good evening,", "Hi there,"]
SYSTEM_PROMPT = "You are a polite and helpful assistant."
OCCASIONS = [
    *("a birthday", "a picnic", "a wedding", "a rainy Sunday", "a long train ride", "a garden party"),
    *("a quiet evening", "a day at the sea", "a visit of old friends", "the first day at work"),
]
IDEAS = {
    "a gift": ["a good book", "a box of fine tea", "fresh flowers", "a small plant"],
    "a meal": ["a warm soup", "a pasta with basil", "a lemon cake", "a green salad"],
    "a game": ["a card game", "a round of chess", "a word puzzle", "a treasure hunt"],
    "some music": ["a calm piano piece", "a cheerful folk song", "a slow waltz", "an old jazz record"],
    "an outfit": ["a light blue shirt", "a warm coat", "comfortable shoes", "a simple dress"],
    "a drink": ["a cold lemonade", "a pot of mint tea", "a glass of apple juice", "a hot chocolate"],
}

ITEMS = "apples books coins eggs flowers marbles oranges pencils shells stamps".split()
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

LISTS = "ages costs dates grades lengths levels marks prices ranks scores sizes speeds times weights".split()
FILES = ["access.log", "errors.log", "notes.txt", "people.csv", "sales.csv", "stock.csv", "words.txt"]
PYTHON_TASKS = [
    ("returns the first {n} {x}", "def first_{n}_{x}({x}):\n    return {x}[:{n}]"),
    ("adds up the first {n} {x}", "def sum_{n}_{x}({x}):\n    return sum({x}[:{n}])"),
    ("finds the largest of the last {n} {x}", "def top_{n}_{x}({x}):\n    return max({x}[-{n}:])"),
    ("keeps the {x} above {n}", "def {x}_above_{n}({x}):\n    return [x for x in {x} if x > {n}]"),
    ("multiplies all {x} by {n}", "def {x}_times_{n}({x}):\n    return [{n} * x for x in {x}]"),
    ("counts the {x} equal to {n}", "def count_{n}_{x}({x}):\n    return {x}.count({n})"),
]
SHELL_TASKS = [
    ("shows the first {n} lines of {x}", "head -n {n} {x}\n# prints the first {n} lines"),
    ("shows the last {n} lines of {x}", "tail -n {n} {x}\n# prints the last {n} lines"),
    ("finds the number {n} in {x}", "grep -n -w {n} {x}\n# prints the lines that hold {n}"),
    ("splits {x} into pieces of {n} lines", "split -l {n} {x}\n# writes pieces of {n} lines"),
]


def chat(rng: random.Random) -> Turns:
    """Make a polite dialogue of one or two rounds."""
    name, occasion = rng.choice(NAMES), rng.choice(OCCASIONS)
    wish, ideas = rng.choice(list(IDEAS.items()))
    first, second = rng.sample(ideas, 2)
    turns = [
        f"{rng.choice(GREETINGS)} I am {name}. Could you suggest {wish} for {occasion}?",
        f"Hello {name}, with pleasure. For {occasion} I would suggest {first}.",
    ]
    if rng.random() < 0.4:
        turns += [
            "Thank you very much. What else could it be?",
            f"You are most welcome, {name}. Another good choice is {second}.",
        ]
    return turns


def arithmetic(rng: random.Random) -> Turns:
    """Work out a sum, difference or product of numbers below 100; half of the sums are asked in words."""
    name, items, kind = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(["words", "plus", "minus", "times"])
    a, b = rng.randint(20, 99), rng.randint(2, 19)
    if kind == "words":
        question = f"What is {in_words(a)} plus {in_words(b)}?"
        work, answer = f"In digits, {a} and {b}: {a} + {b} = {a + b}.", a + b
    elif kind == "plus":
        question = f"{name} has {a} {items} and gets {b} more. How many now?"
        work, answer = f"{a} {items} and {b} more: {a} + {b} = {a + b}.", a + b
    elif kind == "minus":
        question = f"{name} has {a} {items} and gives {b} away. How many are left?"
        work, answer = f"{a} {items} without {b}: {a} - {b} = {a - b}.", a - b
    else:
        question = f"How many {items} are in {b} boxes of {a}?"
        work, answer = f"{b} boxes of {a} {items}: {b} * {a} = {a * b}.", a * b
    return [question, f"{work} The answer is {answer}."]


def code(rng: random.Random) -> Turns:
    """Give a small Python function or shell command for a described task."""
    n = rng.randint(2, 50)
    if rng.random() < 0.5:
        task, answer = rng.choice(PYTHON_TASKS)
        what, x = "Python function", rng.choice(LISTS)
    else:
        task, answer = rng.choice(SHELL_TASKS)
        what, x = "shell command", rng.choice(FILES)
    opening = rng.choice(["Write a", "Give a", "Show a"])
    return [f"{opening} {what} that {task.format(n=n, x=x)}.", answer.format(n=n, x=x)]


def in_words(number: int) -> str:
    """Return the English words of an integer from 0 to 99."""
    if number < 20:
        return UNITS[number]
    tens, units = divmod(number, 10)
    return TENS[tens - 2] + (f"-{UNITS[units]}" if units else "")


GENERATORS = {"chat": chat, "math": arithmetic, "math_again": arithmetic, "code": code}
