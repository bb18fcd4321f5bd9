"""Run directories of any size without a run: the records that `report` reads, on random loads.

Axes: D sources, E experts.
"""

from pathlib import Path

import numpy as np
import orjson
import yaml

NAMES = ("chat", "math", "math_again", "code")
PHASES = {"signal": 1.5, "reduce": 0.01, "update": 0.002, "rebuild": 0.004}


def write_run(
    run_dir: Path,
    *,
    updates: int = 10,
    sources: tuple[str, ...] = NAMES,
    experts: int = 8,
    interval: int = 10,
    train_iters: int | None = None,
    seed: int = 0,
) -> Path:
    """Write config.yaml, mixing.jsonl, metrics.jsonl and ledger.jsonl; returns the folder.

    Sources 1 and 2 load the experts alike, source 0 unlike all, so weight goes to it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    config = {
        "model": {"preset": "tiny"},
        "data": {"sources": {name: {"path": f"data/{name}"} for name in sources}},
        "mixing": {"strategy": "gate-load", "interval": interval, "signal": "probe"},
        "training": {"train_iters": train_iters or updates * interval, "seed": 1234},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    base_DE = rng.dirichlet(np.full(experts, 20.0), len(sources))
    base_DE[0] = rng.dirichlet(np.full(experts, 2.0))
    base_DE[min(2, len(sources) - 1)] = base_DE[min(1, len(sources) - 1)]
    weights_D = np.full(len(sources), 1 / len(sources))
    with (run_dir / "mixing.jsonl").open("wb") as mixing, (run_dir / "metrics.jsonl").open("wb") as metrics:
        for number in range(1, updates + 1):
            record = update_record(rng, sources, base_DE, weights_D, number, number * interval)
            weights_D = record["new_weights"]
            mixing.write(line_of(record))
            metrics.write(line_of(metrics_record(rng, sources, number, number * interval)))
    stages = [stage_record(sources, 0, "start", [1 / len(sources)] * len(sources))]
    for line in (run_dir / "mixing.jsonl").read_bytes().splitlines():
        record = orjson.loads(line)
        stages.append(stage_record(sources, record["iteration"], "update", record["new_weights"]))
    (run_dir / "ledger.jsonl").write_bytes(b"".join(map(line_of, stages)))
    return run_dir


def line_of(record: dict) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"


def update_record(rng, sources, base_DE, old_D, number, iteration) -> dict:
    load_DE = base_DE + rng.normal(0, 1e-3, base_DE.shape)
    distance_DD = np.linalg.norm(load_DE[:, None] - load_DE, axis=-1)
    delta_D = distance_DD.mean(axis=1)
    alpha_D = old_D * np.exp(2 * delta_D)
    new_D = 0.95 * alpha_D / alpha_D.sum() + 0.05 / len(sources)
    half_counts_HDLE = rng.poisson(1000 * base_DE, (2, *base_DE.shape))[:, :, None]
    return {
        "iteration": iteration,
        "consumed_samples": iteration * 32,
        "sources": sources,
        "old_weights": old_D,
        "new_weights": new_D,
        "delta": delta_D,
        "load": load_DE,
        "distance": distance_DD,
        "tokens": [1000 * number] * len(sources),
        "rows": [10 * number] * len(sources),
        "epochs": [0.1 * number] * len(sources),
        "events": [],
        "note": None,
        "override": None,
        "delta_error": None,
        "entropy": float(-(new_D * np.log(new_D)).sum()),
        "kl_step": float((new_D * np.log(new_D / old_D)).sum()),
        "seconds": PHASES,
        "signal": {"layers": [0], "half_counts": half_counts_HDLE},
    }


def metrics_record(rng, sources, number, iteration) -> dict:
    loss = 2 + 4 / number
    return {
        "iteration": iteration,
        "consumed_samples": iteration * 32,
        "lm_loss": loss,
        "source_loss": {name: loss + rng.normal(0, 0.05) for name in sources},
        "lr": 1e-3,
        "grad_norm": 1.0,
        "seconds": 0.5,
        "tokens_per_second": 6000 + rng.normal(0, 100),
        "tokens": {name: 1000 * number for name in sources},
        "skipped_iterations": 0,
    }


def stage_record(sources, iteration, why, weights) -> dict:
    return {"kind": "stage", "why": why, "iteration": iteration, "sources": sources, "weights": weights}


def change(path: Path, place: int, **changes: object) -> None:
    """Set keys of the record on a line."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[place] = line_of(orjson.loads(lines[place]) | changes)
    path.write_bytes(b"".join(lines))
