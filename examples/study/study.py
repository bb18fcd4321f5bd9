"""The whole study: tokenizer, data, a pretrained model, every grid, one page of tables.

    study.py --data DIR --output DIR

DIR holds chat, general, math and code, each with train.jsonl and dev.jsonl (ShareGPT rows); health, finance
and legal too for the parts of domains. Each part is run from random weights and from a pretrained model, its
routers free and frozen. Whatever is finished is kept, so the same command resumes after an interruption, and
what was not begun is left out of the page. Flags of `train` go to every run that is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pieces
import yaml
from corpus import write_corpus

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ("chat", "general", "math", "code")
DOMAINS = ("health", "finance", "legal")
TWICE = "math"
"""The source that the redundancy parts give more than once."""
LARGE = [
    *("--num-layers", "8", "--hidden-size", "512", "--ffn-hidden-size", "1024"),
    *("--num-attention-heads", "8", "--num-query-groups", "4", "--num-moe-experts", "16"),
    *("--init-method-std", "0.02"),
]
"""Flags of the model's shape where there is a GPU."""
SIZES = {
    "cpu": [],
    "gpu": [
        *("--seq-length", "1024", "--bf16", "--lr-warmup-iters", "100"),
        *("--train-iters", "2000", "--interval", "100", "--log-interval", "100", "--probe-tokens", "16384"),
        *("--micro-batch-size", "16", "--global-batch-size", "64"),
    ],
}
"""Flags of every run, beside RUN.yaml."""
STARTS: dict[str, dict[str, dict[str, Any]]] = {
    "random": {},
    "pretrained": {"optimizer": {"lr": 1.0e-3}},
    "frozen": {"model": {"freeze_router": True}, "optimizer": {"lr": 1.0e-3}},
}
"""What the runs begin with, and what that changes in RUN.yaml; all but `random` read the pretrained model."""
SHAPES = {
    "experts-4": ["--num-moe-experts", "4"],
    "experts-32": ["--num-moe-experts", "32"],
    "top-1": ["--moe-router-topk", "1", "--moe-router-pre-softmax"],
    "top-4": ["--moe-router-topk", "4"],
}
"""Flags of parts with another model, which a pretrained one cannot become: they begin at random weights."""
BUDGETS = {"quarter": 0.25, "fourfold": 4}
"""Parts with other numbers of iterations than the size of the model has, in so many times as many."""
PARTS = {
    "methods": "GRID.yaml",
    "twice": "REDUNDANCY.yaml",
    "thrice": "REDUNDANCY.yaml",
    "halves": "REDUNDANCY.yaml",
    "filtered": "REDUNDANCY.yaml",
    "datasets": "FEW.yaml",
    "domains": "FEW.yaml",
    "domains-alone": "FEW.yaml",
    "sweeps": "SWEEPS.yaml",
    "sweeps-twice": "COPIES.yaml",
    **dict.fromkeys((*SHAPES, *BUDGETS), "FEW.yaml"),
}
"""What is run, and its grid."""


class Study:
    """Where everything is, and how a part is run."""

    def __init__(self, arguments: argparse.Namespace, flags: list[str]) -> None:
        self.output = arguments.output.resolve()
        self.data = arguments.data.resolve()
        self.seeds = [seed.strip() for seed in arguments.seeds.split(",")]
        self.jobs = arguments.jobs
        self.is_large = arguments.size == "gpu"
        self.flags = [*SIZES[arguments.size], *flags]
        self.failed = False
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {
            **os.environ,
            **{"DATA": str(self.data), "WORK": str(self.output), "PYTHONPATH": path},
        }

    def run(self, *command: str) -> int:
        """Run a command of this Python, with the study's variables."""
        return subprocess.run([sys.executable, *command], env=self.environment, check=False).returncode

    def must(self, *command: str) -> None:
        """Run a command; its failure ends the study."""
        if code := self.run(*command):
            sys.exit(code)

    def train_tokenizer(self) -> None:
        """Train the tokenizer of all runs, once."""
        folder = self.output / "tokenizer"
        if (folder / "tokenizer.json").is_file():
            return
        vocab_size = yaml.safe_load((HERE / "RUN.yaml").read_text())["model"]["vocab_size"]
        files = [str(self.data / source / "train.jsonl") for source in SOURCES]
        arguments = ["--vocab-size", str(vocab_size), "--output", str(folder), "--input", *files]
        self.must(str(ROOT / "tools/train_tokenizer.py"), *arguments)

    def pretrain(self) -> None:
        """Train on plain text and export, once: what is fine-tuned reads `model`."""
        if (self.output / "model").is_dir():
            return
        print("== pretraining", flush=True)
        write_corpus(self.data, SOURCES, self.output / "corpus")
        run_dir = str(self.output / "pretrain")
        size = [*LARGE, *SIZES["gpu"]] if self.is_large else []
        arguments = (str(HERE / "PRETRAIN.yaml"), "--run-dir", run_dir, "--resume", "auto", *size)
        self.must("-m", "megatron_dynmix", "train", *arguments)
        self.must("-m", "megatron_dynmix", "convert", "megatron-to-hf", run_dir, str(self.output / "model"))

    def sources(self, part: str) -> pieces.Sources:
        """Return the sources of a part."""
        plain = {name: pieces.as_it_is(self.data, name) for name in SOURCES}
        domains = {name: pieces.as_it_is(self.data, name) for name in DOMAINS}
        others = {name: source for name, source in plain.items() if name != TWICE}
        folder = self.output / "pieces"
        if part in ("twice", "thrice", "sweeps-twice"):
            copies = 3 if part == "thrice" else 2
            return plain | {f"{TWICE}-{copy}": dict(plain[TWICE]) for copy in range(2, copies + 1)}
        if part == "halves":
            return others | pieces.halves(self.data, TWICE, folder)
        if part == "filtered":
            return plain | pieces.filtered(self.data, TWICE, folder)
        if part == "datasets":
            return {k: v for name in SOURCES for k, v in pieces.datasets(self.data, name, folder).items()}
        if part == "domains":
            return plain | domains
        return domains if part == "domains-alone" else plain

    def run_yaml(self, part: str, start: str) -> Path:
        """Write the RUN.yaml of a part and return where."""
        settings = yaml.safe_load((HERE / "RUN.yaml").read_text())
        settings["data"]["sources"] = self.sources(part)
        if start != "random":
            settings["model"] = {"load_hf": str(self.output / "model")}
        for section, changed in STARTS[start].items():
            settings[section].update(changed)
        path = self.output / start / f"{part}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path

    def part(self, part: str, start: str) -> None:
        """Run a part from one start. A run that failed is in its table."""
        run_yaml, grid = self.run_yaml(part, start), HERE / PARTS[part]
        flags = [
            *(LARGE if self.is_large and start == "random" else []),
            *self.flags,
            *SHAPES.get(part, []),
            *(self.length(part) if part in BUDGETS else []),
        ]
        print(f"== {part}, {start}", flush=True)
        self.compare(run_yaml, grid, flags=flags)
        if part == "methods":  # what takes something from other runs comes after them
            self.compare(run_yaml, grid, self.write_second(run_yaml.with_suffix("")), flags=flags)

    def length(self, part: str) -> list[str]:
        """Return the flags of a part of another length."""
        flags = dict(zip(self.flags[:-1], self.flags[1:], strict=True))
        usual = yaml.safe_load((HERE / "RUN.yaml").read_text())["training"]["train_iters"]
        return ["--train-iters", str(int(BUDGETS[part] * int(flags.get("--train-iters", usual))))]

    def compare(self, run_yaml: Path, *grids: Path, flags: list[str]) -> None:
        """Run grids; the comparison is beside the RUN.yaml, in a folder of its name."""
        code = self.run(
            *("-m", "megatron_dynmix", "compare", str(run_yaml), "--output", str(run_yaml.with_suffix(""))),
            *(text for grid in grids for text in ("--grid", str(grid))),
            *("--seeds", ",".join(self.seeds), "--jobs", str(self.jobs), *flags),
        )
        if code > 1:
            sys.exit(code)
        self.failed |= code == 1

    def write_second(self, methods: Path) -> Path:
        """Write what `ref-loss` aims at, the losses that uniform ended with; return its grid."""
        for seed in self.seeds:
            evaluation = json.loads((methods / f"uniform/seed-{seed}/evaluation.json").read_text())
            losses = {name: source["loss"] for name, source in evaluation["sources"].items()}
            (methods / f"uniform-losses-{seed}.json").write_text(json.dumps(losses))
        reference = f"{methods}/uniform-losses-{{seed}}.json"
        path = methods / "SECOND.yaml"
        grid = {"ref-loss": {"strategy": "ref-loss", "signal": "probe", "reference": reference}}
        path.write_text(yaml.safe_dump(grid))
        return path

    def page(self) -> str:
        """Return the tables of all that was compared, on one page."""
        import tables  # which needs what `platform` starts

        found: dict[str, Mapping[str, Path]] = {
            part: {
                start: path
                for start in STARTS
                if (path := self.output / start / part / "comparison.json").is_file()
            }
            for part in PARTS
        }
        return "\n\n".join(["# Study", *(tables.part(name, at) for name, at in found.items() if at)]) + "\n"


def main() -> int:
    """Run the command line; return the exit code: 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", choices=list(SIZES), help="of the model; by default what this machine has")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to run")
    parser.add_argument("--starts", default=",".join(STARTS), help="what to run it from")
    arguments, flags = parser.parse_known_args()
    chosen = {}
    for name, known in (("parts", PARTS), ("starts", STARTS)):
        chosen[name] = getattr(arguments, name).split(",")
        if unknown := set(chosen[name]) - set(known):
            parser.error(f"--{name} has no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if "random" not in chosen["starts"] and (shapes := set(chosen["parts"]) & SHAPES.keys()):
        parser.error(f"{', '.join(sorted(shapes))} begin at random weights: add random to --starts")
    needed = (*SOURCES, *(DOMAINS if any(part.startswith("domains") for part in chosen["parts"]) else ()))
    missing = [name for name in needed if not (arguments.data / name / "train.jsonl").is_file()]
    if missing:
        parser.error(f"{arguments.data} has no {missing[0]}/train.jsonl; it needs {', '.join(needed)}")
    from megatron_dynmix import platform

    device = platform.start().device.type
    arguments.size = arguments.size or ("gpu" if device == "cuda" else "cpu")
    study = Study(arguments, flags)
    study.output.mkdir(parents=True, exist_ok=True)
    study.train_tokenizer()
    if set(chosen["starts"]) - {"random"}:
        study.pretrain()
    for start in chosen["starts"]:
        for part in chosen["parts"]:
            if start == "random" or part not in SHAPES:
                study.part(part, start)
    (study.output / "study.md").write_text(study.page())
    print(f"written: {study.output / 'study.md'}")
    return int(study.failed)


if __name__ == "__main__":
    sys.exit(main())
