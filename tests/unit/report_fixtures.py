"""Run directories of any size without a run: the records that `report` reads, on random loads.

Axes: D sources, E experts.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import yaml

from megatron_dynmix.mixing.expert_use import expert_use
from megatron_dynmix.records.schema import Line, Measured, MixingUpdate, TrainingRecord
from megatron_dynmix.records.signals import SIGNALS, SignalWriter

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
    load: np.ndarray | None = None,
) -> Path:
    """Write config.yaml, mixing.jsonl, signals.bin, metrics.jsonl and ledger.jsonl; return the folder.

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
    stages = [stage_record(sources, 0, "start", [1 / len(sources)] * len(sources))]
    signals = SignalWriter(run_dir / SIGNALS, [])
    with (run_dir / "mixing.jsonl").open("wb") as mixing, (run_dir / "metrics.jsonl").open("wb") as metrics:
        for number in range(1, updates + 1):
            update = update_of(rng, sources, base_DE, weights_D, number, number * interval)
            update = replace(update, load=update.load if load is None else load)
            weights_D = np.array(update.new_weights)
            mixing.write(line_of(replace(update, block=signals.append(update.arrays))))
            metrics.write(line_of(metrics_record(rng, sources, number, number * interval)))
            stages.append(stage_record(sources, update.iteration, "update", update.new_weights))
    signals.close()
    (run_dir / "ledger.jsonl").write_bytes(b"".join(map(line_of, stages)))
    return run_dir


def line_of(record: Line | dict) -> bytes:
    content = record.to_json() if isinstance(record, Line) else record
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"


def update_of(rng, sources, base_DE, old_D, number, iteration) -> MixingUpdate:
    load_DE = base_DE + rng.normal(0, 1e-3, base_DE.shape)
    distance_DD = np.linalg.norm(load_DE[:, None] - load_DE, axis=-1)
    delta_D = distance_DD.mean(axis=1)
    alpha_D = old_D * np.exp(2 * delta_D)
    new_D = 0.95 * alpha_D / alpha_D.sum() + 0.05 / len(sources)
    half_counts_HDLE = rng.poisson(1000 * base_DE, (2, *base_DE.shape))[:, :, None]
    return MixingUpdate(
        iteration=iteration,
        consumed_samples=iteration * 32,
        sources=list(sources),
        old_weights=list(old_D),
        new_weights=new_D.tolist(),
        delta=delta_D.tolist(),
        load=load_DE,
        distance=distance_DD,
        tokens=[1000 * number] * len(sources),
        rows=[10 * number] * len(sources),
        epochs=[0.1 * number] * len(sources),
        entropy=float(-(new_D * np.log(new_D)).sum()),
        kl_step=float((new_D * np.log(new_D / old_D)).sum()),
        seconds=PHASES,
        signal=Measured(train_iters=100, interval_rows=320, run_rows=3200, num_layers=1),
        counts={"half_counts": half_counts_HDLE},
        expert_use=expert_use(half_counts_HDLE.sum(axis=0), np.array(old_D)),
    )


def metrics_record(rng, sources, number, iteration) -> TrainingRecord:
    loss = 2 + 4 / number
    return TrainingRecord(
        iteration=iteration,
        consumed_samples=iteration * 32,
        lm_loss=loss,
        source_loss={name: loss + rng.normal(0, 0.05) for name in sources},
        lr=1e-3,
        grad_norm=1.0,
        global_batch_size=32,
        seconds=0.5,
        tokens_per_second=6000 + rng.normal(0, 100),
        useful_token_share=1.0,
        tokens={name: 1000 * number for name in sources},
        skipped_iterations=0,
        aux_losses={},
    )


def stage_record(sources, iteration, why, weights) -> dict:
    return {"kind": "stage", "why": why, "iteration": iteration, "sources": sources, "weights": weights}


def change(path: Path, place: int, **changes: object) -> None:
    """Set keys of the record on a line."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[place] = line_of(orjson.loads(lines[place]) | changes)
    path.write_bytes(b"".join(lines))
