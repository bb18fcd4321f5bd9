"""Every row of the paper's tables as one comparison, printed as there (Zhu et al., NAACL 2025).

Usage: paper.py --run RUN.yaml --data DIR --output DIR [--tables 1,2,4,5] [more flags of `compare`]

DIR holds chat, general, math and code, each with train.jsonl and dev.jsonl. Without --run a tiny model is
made; then minutes on a CPU are enough. Flags of its own: --help.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TOOLS = HERE.parents[1] / "tools"
SOURCES = ("chat", "general", "math", "code")
SIZES = {"chat": 58735, "general": 2891080, "math": 262039, "code": 121959}
"""Examples of the originals, of which the paper's releases hold 20,000 each."""
ROWS = {
    "1": {
        "w/o IT": "without",
        "DataSize": "data-size",
        "Uniform": "uniform",
        "Random": "random",
        "Sequential": "sequential",
        "RefLoss": "ref-loss",
        "Dynamic": "dynamic",
    },
    "2": {
        "FinalStatic": "final-static",
        "SentEmb": "sent-emb",
        "GateLoad": "gate-load-static",
        "Dynamic_SentEmb": "dynamic-sent-emb",
    },
    "3": {
        "w/o frozen gate": "no-frozen-gate",
        "w/o balance loss": "no-balance-loss",
        "w/o gate noise": "no-gate-noise",
    },
    "4": {"2 m": "twice-m", "m / 2": "half-m", "m / 5": "fifth-m"},
    "5": {"Inverse": "inverse"},
}
"""Table -> its rows, by their names there -> variant. Those that a table has of table 1 stand there."""


def grid_of(tables: Sequence[str], run: dict[str, Any], output: Path, embeddings: Path) -> dict[str, Any]:
    """Return the variants of the tables' rows, as `--grid` has them."""
    interval, phase = run["mixing"]["interval"], run["training"]["train_iters"] // 4
    methods = output / "methods"
    known: dict[str, dict[str, Any]] = {
        # no training: one step of a length that no weight notices
        "without": {"strategy": "uniform", "train_iters": 1, "lr_warmup_iters": 0, "lr": 1e-30},
        "data-size": {"strategy": "data-size", "sizes": SIZES},
        "uniform": {"strategy": "uniform"},
        "random": {"strategy": "random"},
        "sequential": {"strategy": "sequential", "every": phase, "interval": phase},
        "ref-loss": {
            "strategy": "ref-loss",
            "reference": f"{methods}/uniform/seed-{{seed}}/evaluation.json",
        },
        "dynamic": {"strategy": "gate-load"},
        "final-static": {"strategy": "final-static", "weights_from": f"{methods}/dynamic/seed-{{seed}}"},
        "sent-emb": {"strategy": "sent-emb", "embeddings": str(embeddings)},
        "gate-load-static": {
            "strategy": "final-static",
            "weights_from": f"{output}/similarity/weights-gate-load.json",
        },
        "dynamic-sent-emb": {
            "strategy": "gate-load",
            "begin_with": "sent-emb",
            "embeddings": str(embeddings),
        },
        "no-frozen-gate": {"strategy": "gate-load", "freeze_router": False, "freeze_expert_gate": False},
        "no-balance-loss": {"strategy": "gate-load", "moe_aux_loss_coeff": 0.0},
        "no-gate-noise": {"strategy": "gate-load", "router_noise": "idle"},
        "twice-m": {"strategy": "gate-load", "interval": 2 * interval},
        "half-m": {"strategy": "gate-load", "interval": max(interval // 2, 1)},
        "fifth-m": {"strategy": "gate-load", "interval": max(interval // 5, 1)},
        "inverse": {"strategy": "inverse"},
    }
    # those that others build on are among them
    wanted = ["uniform", "dynamic", *(name for table in tables for name in ROWS[table].values())]
    return {name: known[name] for name in dict.fromkeys(wanted)}


AFTER = ("ref-loss", "final-static")
"""Variants that begin with what another has ended with."""


def make_tiny(data: Path, output: Path) -> Path:
    """Make a tiny model with its tokenizer, once; return its RUN.yaml."""
    model = output / "model"
    os.environ |= {"MODEL": str(model), "DATA": str(data), "WORK": str(output)}
    if not model.is_dir():
        files = [str(data / source / "train.jsonl") for source in SOURCES]
        tokenizer = str(output / "tokenizer")
        train = ["--vocab-size", "512", "--output", tokenizer, "--input", *files]
        subprocess.run([sys.executable, str(TOOLS / "train_tokenizer.py"), *train], check=True)
        make = runpy.run_path(str(TOOLS / "tiny_mixtral.py"))["main"]
        assert make(["--tokenizer", tokenizer, "--output", str(model)]) == 0
    return HERE / "TINY.yaml"


def letter_shares(data: Path, output: Path) -> Path:
    """Write how often each source has each byte, which takes the place of sentence embeddings."""
    shares = {}
    for source in SOURCES:
        text = (data / source / "dev.jsonl").read_bytes()
        shares[source] = [text.count(byte) / len(text) for byte in range(256)]
    path = output / "letter-shares.json"
    path.write_text(json.dumps(shares))
    return path


def run_command(*command: str) -> None:
    """Run a command of megatron-dynmix, and end with its exit code if it cannot go on."""
    from megatron_dynmix.cli import main as megatron_dynmix

    print(f"== {' '.join(command[:2])}", flush=True)
    if (code := megatron_dynmix(command)) > 1:
        sys.exit(code)


def layout(comparison: dict[str, Any], tables: Sequence[str]) -> str:
    """Return the tables with methods as rows and tasks as columns; losses where no task was asked."""
    found = {variant["name"]: variant["metrics"] for variant in comparison["variants"]}
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    columns = [name for name in names if name.startswith("task/")]
    what = "percent"
    if not columns:
        columns = [*(name for name in names if name.startswith("loss/")), "mean_loss"]
        what = "held-out loss in nats"
    lines = [f"# The paper's tables, {what}, mean ± standard deviation over the seeds"]
    for table in tables:
        rows = {**({} if table == "1" else {"Uniform": "uniform", "Dynamic": "dynamic"}), **ROWS[table]}
        header = [name.split("/")[-1].replace("_", " ") for name in columns]
        lines += [
            "",
            f"## Table {table}",
            "",
            f"| | {' | '.join(header)} |",
            "|---" * (len(header) + 1) + "|",
        ]
        for title, name in rows.items():
            cells = [cell(found.get(name, {}).get(column)) for column in columns]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(metric: dict[str, Any] | None) -> str:
    """Return a number as the tables have it."""
    if metric is None:
        return "-"
    return f"{metric['mean']:.2f}" + ("" if metric["sd"] is None else f" ± {metric['sd']:.2f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="RUN.yaml", help="whose model, data and length are taken")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the sources")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tables", default="1,2", help="of 1 to 5; 3 is of LLaMA-MoE (default 1,2)")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--embeddings", type=Path, help="of tools/embed_sources.py; else shares of letters")
    parser.add_argument("--similarity", default="", help="flags for `similarity`, as '--nproc-per-node 4'")
    given, flags = parser.parse_known_args(arguments)
    tables = given.tables.split(",")
    if unknown := [table for table in tables if table not in ROWS]:
        parser.error(f"there is no table {', '.join(unknown)}; give some of {', '.join(ROWS)}")
    data, output = given.data.resolve(), given.output.resolve()
    if missing := [name for name in SOURCES if not (data / name / "train.jsonl").is_file()]:
        parser.error(f"{data} has no {missing[0]}/train.jsonl; it needs {', '.join(SOURCES)}")
    output.mkdir(parents=True, exist_ok=True)
    run_yaml = given.run or make_tiny(data, output)
    run = yaml.safe_load(run_yaml.read_text(encoding="utf-8"))
    embeddings = given.embeddings or letter_shares(data, output)
    if "2" in tables and not (output / "similarity/weights-gate-load.json").is_file():
        held_out = [f"{name}={data / name / 'dev.jsonl'}" for name in SOURCES]
        model = os.path.expandvars(run["model"]["load_hf"])
        rows = [("--seq-length", run["data"]["seq_length"]), ("--overlong", run["data"]["overlong"])]
        rows += [("--tokens", run["mixing"]["probe_tokens"]), ("--output", output / "similarity")]
        template = run["data"]["template"]
        rows += [("--template", run_yaml.parent / template if template.endswith(".jinja") else template)]
        sample = [str(word) for pair in rows for word in pair]
        run_command("similarity", model, *held_out, *sample, *given.similarity.split())
    grid = grid_of(tables, run, output, embeddings)
    first, path = {name: grid[name] for name in grid if name not in AFTER}, output / "GRID.yaml"
    for variants in [first] if first == grid else [first, grid]:
        path.write_text(yaml.safe_dump(variants, sort_keys=False), encoding="utf-8")
        common = ("--grid", str(path), "--seeds", given.seeds, "--output", str(output / "methods"))
        run_command("compare", str(run_yaml), *common, *flags)
    comparison = json.loads((output / "methods/comparison.json").read_text(encoding="utf-8"))
    text = layout(comparison, tables)
    (output / "paper.md").write_text(text, encoding="utf-8")
    print(f"{text}\nwritten: {output / 'paper.md'}; comparison.html beside the runs in {output / 'methods'}")
    return int(bool(comparison["failures"]))


if __name__ == "__main__":
    sys.exit(main())
