"""How well a run has learned: the held-out loss of each source.

On one rank, whatever layout the run had: its checkpoint knows none.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_dynmix import platform
from megatron_dynmix.checkpoint.folder import verified
from megatron_dynmix.checkpoint.model_weights import load_weights
from megatron_dynmix.checkpoint.run_state import read_run_state
from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import load_config
from megatron_dynmix.config.megatron import STAGE_SETTINGS
from megatron_dynmix.config.run_config import ParallelConfig
from megatron_dynmix.data.loader import collate
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.source_stats import SourceStats
from megatron_dynmix.data.sources import build_rows, prepare_sources
from megatron_dynmix.data.tokenizer.load import load_tokenizer
from megatron_dynmix.errors import CommandFailed, InputError
from megatron_dynmix.files import write_atomically
from megatron_dynmix.mixing.strategy import half_of
from megatron_dynmix.training.run import build_runner, join_job
from megatron_dynmix.training.step import PassRunner
from megatron_dynmix.training.trainer import seed_iteration

MOST_NATS = 700.0
"""The perplexity of a higher loss is no number that a float can hold."""


@dataclass(frozen=True)
class HeldOut:
    """A source's mean loss over the trained tokens of all its held-out rows, in nats."""

    loss: float
    perplexity: float
    tokens: int
    """Trained ones."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluation.json` holds."""

    iteration: int
    sources: Mapping[str, HeldOut | None]
    """None without held-out rows."""
    mean_loss: float
    """Over the sources."""
    worst_loss: float
    worst_source: str
    token_loss: float
    """Over all tokens."""
    perplexity: float

    @staticmethod
    def path(run_dir: Path) -> Path:
        """Return where a run's evaluation is."""
        return run_dir / "evaluation.json"

    def write(self, run_dir: Path) -> None:
        """Write the run's evaluation."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)
        write_atomically(self.path(run_dir), text + "\n")

    @classmethod
    def read(cls, run_dir: Path) -> Evaluation | None:
        """Return a run's evaluation; None without a whole one of this version."""
        try:
            content = json.loads(cls.path(run_dir).read_text(encoding="utf-8"))
            sources = {name: held and HeldOut(**held) for name, held in content["sources"].items()}
            return cls(**content | {"sources": sources})
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return None


def evaluate(run_dir: Path) -> Evaluation:
    """Evaluate the newest checkpoint of a run with the run's own configuration; write `evaluation.json`.

    Raises:
        InputError: no run or no checkpoint in the directory, or no source has held-out rows.
        CommandFailed: the model has diverged.

    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{run_dir} holds no run: there is no config.yaml in it; give the --run-dir of a run"
        )
    config = on_one_rank(load_config(path))
    if not config.data.probed:
        raise InputError(
            f"{run_dir}: no source has held-out rows to evaluate on; give some, as data.sources.NAME.probe"
        )
    tokenizer = load_tokenizer(config.data.tokenizer or "", trust_remote_code=config.data.trust_remote_code)
    for _ in prepare_sources(config, tokenizer):
        pass  # as the run did: what is prepared is only looked at
    rows = build_rows(config, tokenizer, probe=True)
    join_job(config)
    point = verified(run_dir / "checkpoints")
    run = _load_model(config, len(rows), point.source)
    stats = held_out_stats(run, rows, config.training.micro_batch_size)
    evaluation = summarise(config, stats, read_run_state(point.source).progress.iteration)
    evaluation.write(run_dir)
    return evaluation


def on_one_rank(config: RunConfig) -> RunConfig:
    """Return the configuration of the same model without any parallelism."""
    model = {name: value for name, value in config.model.megatron.items() if name not in STAGE_SETTINGS}
    return dataclasses.replace(
        config, parallel=ParallelConfig(), model=dataclasses.replace(config.model, megatron=model)
    )


def _load_model(config: RunConfig, num_sources: int, source: Path) -> PassRunner:
    """Build the model of a checkpoint, in evaluation mode."""
    seed_iteration(config.training.seed, -1)  # building draws weights, which the checkpoint's then replace
    run = build_runner(config, num_sources, platform.start(), trains=False)
    load_weights(run.chunks, source)
    for chunk in run.chunks:
        chunk.eval()
    return run


def held_out_stats(run: PassRunner, rows: Sequence[PackedRows], micro_batch_size: int) -> SourceStats:
    """Sum losses and tokens over all rows of all sources; the model is in evaluation mode."""
    stats = SourceStats.zero(len(rows))
    most_segments = run.most_segments(rows)
    with torch.no_grad():
        for dataset_id, held_out in enumerate(rows):
            for first in range(0, len(held_out), micro_batch_size):
                some = range(first, min(first + micro_batch_size, len(held_out)))
                batch = [
                    {"dataset_id": np.int16(dataset_id), "half": np.int8(half_of(row)), **held_out[row]}
                    for row in some
                ]
                stats += run([collate(batch, most_segments)], forward_only=True)
    return stats


def summarise(config: RunConfig, stats: SourceStats, iteration: int) -> Evaluation:
    """Return the numbers of `evaluate` from sums over the held-out rows, in the order of their sources.

    Raises:
        CommandFailed: a loss that is not finite, or has no perplexity.

    """
    held_out = list(config.data.probed)
    losses = dict(zip(held_out, stats.source_losses(), strict=True))
    trained = dict(zip(held_out, stats.trained_D.tolist(), strict=True))
    known = {name: loss for name, loss in losses.items() if loss is not None}
    for name, loss in known.items():
        if not loss < MOST_NATS:
            raise CommandFailed(
                f"the held-out loss of source {name} is {loss}: the model has diverged, and there is nothing "
                "to evaluate; train again with a lower learning rate"
            )
    worst = max(known, key=known.__getitem__)
    return Evaluation(
        iteration=iteration,
        sources={
            name: HeldOut(known[name], math.exp(known[name]), int(trained[name])) if name in known else None
            for name in config.data.sources
        },
        mean_loss=math.fsum(known.values()) / len(known),
        worst_loss=known[worst],
        worst_source=worst,
        token_loss=stats.lm_loss,
        perplexity=math.exp(stats.lm_loss),
    )
