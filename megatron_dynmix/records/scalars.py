"""What a run's records are called on a dashboard: Megatron-LM's tags, and ours under `dynmix/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CHARTS = {
    "weights": r"dynmix/weight/.*",
    "loss of each source": r"dynmix/lm-loss/.*",
    "delta of each source": r"dynmix/delta/.*",
    "share of the tokens so far": r"dynmix/token-share/.*",
    "epochs of each source": r"dynmix/epochs/.*",
    "busiest expert over the mean, by layer": r"dynmix/expert-load/.*",
}
"""Charts that show several tags at once: title -> regular expression of the tags."""


def training_scalars(record: Mapping[str, Any], sources: Sequence[str]) -> dict[str, float]:
    """Scalars of one training record (see `MetricsWriter.training`); a source without a loss has none."""
    losses = {f"dynmix/lm-loss/{name}": record["source_loss"][name] for name in sources}
    return _known(
        {
            **megatron_scalars(record),
            "iteration-time": record["seconds"],
            "tokens-per-second": record["tokens_per_second"],
            "useful-token-share": record["useful_token_share"],
            "skipped-iterations": record["skipped_iterations"],
            **losses,
        }
    )


def megatron_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The scalars that Megatron-LM writes both over iterations and over consumed samples."""
    return _known(
        {
            "lm loss": record["lm_loss"],
            **record["aux_losses"],
            "learning-rate": record["lr"],
            "batch-size": record["global_batch_size"],
            "grad-norm": record["grad_norm"],
        }
    )


def mixing_scalars(update: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of one weight update (see `MetricsWriter.mixing`); what it holds as None has none."""
    sources = update["sources"]
    tokens_D = np.asarray(update["tokens"], dtype=np.float64)
    per_source = {
        "weight": update["new_weights"],
        "delta": update["delta"],
        "token-share": tokens_D / tokens_D.sum() if tokens_D.any() else None,
        "epochs": update["epochs"],
        "probe-lm-loss": update["probe_loss"],
        "delta-error": update["delta_error"],
        "example-weight": update.get("example_weights"),
        **{f"shadow/{label}": weights for label, weights in update["shadow"].items()},
    }
    scalars = {
        f"dynmix/{name}/{source}": value
        for name, values_D in per_source.items()
        if values_D is not None
        for source, value in zip(sources, values_D, strict=True)
    }
    expert_load = update.get("expert_load") or []
    return _known(
        {
            **scalars,
            "dynmix/entropy": update["entropy"],
            "dynmix/kl-step": update["kl_step"],
            **{f"dynmix/seconds/{part}": value for part, value in update["seconds"].items()},
            **{f"dynmix/expert-load/layer-{layer}": load for layer, load in enumerate(expert_load)},
        }
    )


def _known(scalars: Mapping[str, Any]) -> dict[str, float]:
    # float() also reads the "NaN" of a record that comes back from a JSONL file
    return {tag: float(value) for tag, value in scalars.items() if value is not None}
