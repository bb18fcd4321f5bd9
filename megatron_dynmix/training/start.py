"""Where a run starts: at its checkpoint, at another run's weights, at a Hugging Face model, or at nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dynmix.checkpoint import restore_point
from megatron_dynmix.checkpoint.checkpoint import Checkpointer
from megatron_dynmix.config import RunConfig
from megatron_dynmix.convert.hugging_face import load_hugging_face
from megatron_dynmix.convert.hugging_face_export import keep_origin
from megatron_dynmix.records.ledger import DrawnSamples
from megatron_dynmix.records.logline import loaded_line, loading_line
from megatron_dynmix.training.progress import LogInterval, Progress
from megatron_dynmix.training.reweighting import Reweighting
from megatron_dynmix.training.source_change import Prints, SourceChange, SourceSet, differences, fingerprint


@dataclass(frozen=True)
class Start:
    """The state that a run begins with, beside that of its mix."""

    progress: Progress
    interval: LogInterval
    drawn: DrawnSamples
    source_changes: list[str]
    """What became of each source, if they are not those of the checkpoint."""


def restore(
    config: RunConfig,
    checkpointer: Checkpointer,
    reweighting: Reweighting,
    prints: Prints,
    say: Callable[[str], None],
    source: Path | None,
) -> Start:
    """Load what the run starts from into model, optimizer and mix.

    Args:
        config: the resolved configuration.
        checkpointer: knows model and optimizer.
        reweighting: knows the mix.
        prints: what the sources hold now; the mix is carried over to them if they are others.
        say: prints a line, on one rank.
        source: the run's checkpoint; None to begin.

    """
    if source is not None:
        state, changes = _carried(checkpointer.load(source), reweighting, prints)
        reweighting.load_state_dict(state["mixing"])
        size = config.parallel.size
        tp, pp = size("tensor_model_parallel_size"), size("pipeline_model_parallel_size")
        say(loading_line(state["iteration"], checkpointer.directory))
        say(loaded_line(state["iteration"], checkpointer.directory, tp_size=tp, pp_size=pp))
        for change in changes:
            say(f"  from sample {state['consumed_samples']} on: {change}")
        tokens_D = torch.tensor(state["tokens"], dtype=torch.float64)
        return Start(
            Progress(state["iteration"], state["consumed_samples"], tokens_D, state["skipped_in_row"]),
            LogInterval.from_state_dict(state["log_interval"]),
            DrawnSamples.from_state_dict(state["drawn_samples"]),
            changes,
        )
    if config.checkpoint.pretrained_checkpoint is not None:
        pretrained = restore_point.verified(Path(config.checkpoint.pretrained_checkpoint))
        checkpointer.load_weights(restore_point.exact(pretrained))
    elif config.model.load_hf is not None:
        load_hugging_face(config, checkpointer, say)
    keep_origin(config, checkpointer.directory)
    num_sources = len(config.data.sources)
    return Start(
        Progress(0, 0, torch.zeros(num_sources, dtype=torch.float64)),
        LogInterval.start(num_sources),
        DrawnSamples(0, carried=0),
        [],
    )


def _carried(
    state: dict[str, Any], reweighting: Reweighting, prints: Prints
) -> tuple[dict[str, Any], list[str]]:
    """The state for the sources of now, and what was done to it; whether it may be was asked before."""
    if not differences(state["fingerprints"], prints):
        return state, []
    before = SourceSet.of(state["fingerprints"], state["mixing"]["blend"])
    change = SourceChange.between(
        before, list(prints), list(map(fingerprint, prints.values())), reweighting.blend.sizes_D.tolist()
    )
    return change.carry(state, reweighting.blend.weights_D)
