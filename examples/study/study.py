"""The whole study: tokenizer, data, every grid, one page of tables.

    study.py --data DIR --output DIR

DIR holds chat, general, math and code, each with train.jsonl and dev.jsonl (ShareGPT rows). Whatever is
finished is kept, so the same command resumes after an interruption. Flags of `train` go to every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ("chat", "general", "math", "code")
TWICE = "math"
"""The source that the redundancy test gives twice."""
SIZES = {
    "cpu": [],
    "gpu": [
        *("--num-layers", "8", "--hidden-size", "512", "--ffn-hidden-size", "1024"),
        *("--num-attention-heads", "8", "--num-query-groups", "4", "--num-moe-experts", "16"),
        *(
            "--seq-length",
            "1024",
            "--bf16",
            "--init-method-std",
            "0.02",
            "--lr",
            "1e-3",
            "--lr-warmup-iters",
            "100",
        ),
        *("--train-iters", "2000", "--interval", "100", "--log-interval", "100", "--probe-tokens", "16384"),
        *("--micro-batch-size", "16", "--global-batch-size", "64"),
    ],
}
"""Flags of every run, beside RUN.yaml."""
PHASE = {"cpu": 50, "gpu": 500}
"""Iterations that `sequential` stays with a source: it goes through all four once."""


class Study:
    """Where everything is, and how a grid is run."""

    def __init__(self, arguments: argparse.Namespace, flags: list[str]) -> None:
        self.output = arguments.output.resolve()
        self.data = arguments.data.resolve()
        self.seeds = [seed.strip() for seed in arguments.seeds.split(",")]
        self.jobs = arguments.jobs
        self.phase = PHASE[arguments.size]
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

    def train_tokenizer(self) -> None:
        """Train the tokenizer of all runs, once."""
        folder = self.output / "tokenizer"
        if (folder / "tokenizer.json").is_file():
            return
        vocab_size = yaml.safe_load((HERE / "RUN.yaml").read_text())["model"]["vocab_size"]
        files = [str(self.data / source / "train.jsonl") for source in SOURCES]
        arguments = ["--vocab-size", str(vocab_size), "--output", str(folder), "--input", *files]
        if code := self.run(str(ROOT / "tools/train_tokenizer.py"), *arguments):
            sys.exit(code)

    def compare(self, name: str, *grids: Path, run_yaml: Path = HERE / "RUN.yaml") -> Path:
        """Run grids; return where the comparison is. A run that failed is in its table."""
        folder = self.output / name
        print(f"== {name}", flush=True)
        code = self.run(
            *("-m", "megatron_dynmix", "compare", str(run_yaml), "--output", str(folder)),
            *(text for grid in grids for text in ("--grid", str(grid))),
            *("--seeds", ",".join(self.seeds), "--jobs", str(self.jobs), *self.flags),
        )
        if code > 1:
            sys.exit(code)
        self.failed |= code == 1
        return folder

    def methods(self) -> Path:
        """Run all methods: first those that stand alone, then those that take something from their runs."""
        sequential = self.output / "SEQUENTIAL.yaml"
        settings = {"strategy": "sequential", "every": self.phase}
        sequential.write_text(yaml.safe_dump({"sequential": settings}))
        folder = self.compare("methods", HERE / "GRID.yaml", sequential)
        return self.compare("methods", HERE / "GRID.yaml", sequential, self.write_two_phase(folder))

    def write_two_phase(self, methods: Path) -> Path:
        """Write what the second phase starts from, and its grid; return the grid."""
        folder = self.output / "two_phase"
        folder.mkdir(exist_ok=True)
        for seed in self.seeds:
            evaluation = json.loads((methods / f"uniform/seed-{seed}/evaluation.json").read_text())
            losses = {name: source["loss"] for name, source in evaluation["sources"].items()}
            (folder / f"uniform-losses-{seed}.json").write_text(json.dumps(losses))
        embeddings = {source: token_shares(self.output / "prepared" / source) for source in SOURCES}
        (folder / "token-shares.json").write_text(json.dumps(embeddings))
        grid = {
            "ref-loss": {
                **{"strategy": "ref-loss", "signal": "probe"},
                "reference": f"{folder}/uniform-losses-{{seed}}.json",
            },
            "final-static": {
                "strategy": "final-static",
                "weights_from": f"{methods}/gate-load-probe/seed-{{seed}}",
            },
            "token-share-static": {"strategy": "sent-emb", "embeddings": f"{folder}/token-shares.json"},
        }
        path = folder / "GRID.yaml"
        path.write_text(yaml.safe_dump(grid, sort_keys=False))
        return path

    def redundancy(self) -> Path:
        """Run the same with one source given twice."""
        settings = yaml.safe_load((HERE / "RUN.yaml").read_text())
        settings["data"]["sources"][f"{TWICE}-again"] = dict(settings["data"]["sources"][TWICE])
        path = self.output / "REDUNDANT.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return self.compare("redundancy", HERE / "REDUNDANCY.yaml", run_yaml=path)


def token_shares(prefix: Path) -> list[float]:
    """Return how often a prepared source uses each token, as a vector of length one.

    Takes the place of sentence embeddings, which need a model of their own: it tells as they do which
    sources are alike before anything is trained.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(str(prefix), multimodal=True)
    tokens = np.fromfile(f"{prefix}.bin", dtype=indexed.index.dtype)
    counts = np.bincount(tokens, minlength=int(tokens.max()) + 1).astype(np.float64)
    vocabulary = yaml.safe_load((HERE / "RUN.yaml").read_text())["model"]["vocab_size"]
    shares = np.zeros(vocabulary)
    shares[: len(counts)] = counts / np.linalg.norm(counts)
    return [float(share) for share in shares]


def page(folders: list[Path]) -> str:
    """Return the tables of all grids on one page, with links to their pages."""
    parts = ["# Study"]
    for folder in folders:
        text = (folder / "comparison.md").read_text().split("\n", 1)[1]
        text = text.replace("\n## ", "\n### ").replace("](", f"]({folder.name}/")
        parts.append(f"## {folder.name.capitalize()}\n{text.rstrip()}")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Run the command line; return the exit code: 1 if a run failed."""
    from megatron_dynmix import platform

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", choices=list(SIZES), help="of the model; by default what this machine has")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--parts", default="methods,sweeps,redundancy", help="what to run")
    arguments, flags = parser.parse_known_args()
    device = platform.start().device.type
    arguments.size = arguments.size or ("gpu" if device == "cuda" else "cpu")
    missing = [name for name in SOURCES if not (arguments.data / name / "train.jsonl").is_file()]
    if missing:
        parser.error(f"{arguments.data} has no {missing[0]}/train.jsonl; it needs {', '.join(SOURCES)}")
    study = Study(arguments, flags)
    study.output.mkdir(parents=True, exist_ok=True)
    study.train_tokenizer()
    parts = {
        "methods": study.methods,
        "sweeps": lambda: study.compare("sweeps", HERE / "SWEEPS.yaml"),
        "redundancy": study.redundancy,
    }
    wanted = arguments.parts.split(",")
    if unknown := set(wanted) - parts.keys():
        parser.error(f"--parts has no {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    folders = [parts[name]() for name in wanted]
    (study.output / "study.md").write_text(page(folders))
    print(f"written: {study.output / 'study.md'}")
    return int(study.failed)


if __name__ == "__main__":
    sys.exit(main())
