"""What a run says before it starts: its configuration, what became of the data, what was changed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import to_yaml
from megatron_dynmix.config.megatron_fields import model_settings
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.data.prepared import SourceReport
from megatron_dynmix.data.row_text import excerpt, plain, row_text
from megatron_dynmix.data.sources import source_files
from megatron_dynmix.errors import InputError
from megatron_dynmix.moe.balance import aux_losses
from megatron_dynmix.plan.parameters import this_host
from megatron_dynmix.plan.plan import Plan, SourceWork
from megatron_dynmix.plan.text import epochs_table, memory_text, model_line, needs_line
from megatron_dynmix.training.data_tables import packed_table, prepared_table, share_table, shared_lines
from megatron_dynmix.training.setup import PreparedRun

SHOWN_LINES = 10
"""Lines of a row at the start of the log."""
NOTABLE_FACTOR = 1.1
"""Real / trained tokens from which a coefficient that was tuned elsewhere means something else here."""


def report_start(prepared: PreparedRun, run_dir: Path, changes: Sequence[str], notes: Sequence[str]) -> None:
    """Print everything a user should see once, on one rank.

    `changes` are settings that are not those of the checkpoint, `notes` tell of checkpoints not used.
    """
    config, data = prepared.config, prepared.data
    most = config.logging.most_of(config.data.sources)
    print(f"------------------------ arguments ------------------------\n{settings_text(config, most)}")
    print("-------------------- end of arguments ---------------------")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    lines = [
        prepared_table(data.reports, most),
        *shared_lines(list(source_files(config)), config),
        f"\n{packed_table([*data.train, *data.probe], most)}",
        f"\n{share_table(data.train, prepared.mix.initial_D, most)}",
        f"\n{overview(prepared, world_size)}",
        *([f"WARNING: {error}"] if (error := this_host().transformer_engine_error) else []),
        *mix_warnings(config),
        *router_lines(config, data.reports),
        "\nthe beginning of a row, [[what is trained on]] and {{special tokens}} in brackets:",
        excerpt(plain(row_text(data.train[0], 0, data.tokenizer)), SHOWN_LINES),
        *notes,
        *(f"changed since the checkpoint: {change}" for change in changes),
    ]
    print(*lines, sep="\n")
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    print(f"\ntraining on {ranks}; everything is written to {run_dir}:\n{written(config)}\n", flush=True)


def settings_text(config: RunConfig, most: int | None) -> str:
    """Return the configuration as YAML, with the first `most` of very many sources."""
    if most is None:
        return to_yaml(config).rstrip()
    first = dict(itertools.islice(config.data.sources.items(), most))
    some = to_yaml(replace(config, data=replace(config.data, sources=first))).rstrip()
    return f"{some}\n# of {len(config.data.sources):,} sources the first {most}; config.yaml has all"


def overview(prepared: PreparedRun, world_size: int) -> str:
    """Return model, layout, epochs of each source and memory, as `plan` estimates them."""
    config = prepared.config
    shares = prepared.mix.first_D.tolist()
    works = [SourceWork.of(rows, share) for rows, share in zip(prepared.data.train, shares, strict=True)]
    plan = Plan(
        config=config,
        world_size=world_size,
        host=this_host(),
        sources={work.name: work for work in works},
        batches=prepared.mix.horizon.schedule,
    )
    try:
        epochs = epochs_table(plan, works, config.logging.most_of(works))
        lines = [model_line(plan), f"layout   {plan.layout.describe()}", epochs]
        return "\n".join([*lines, memory_text(plan), needs_line(plan.largest, plan.host)])
    except InputError as error:  # a model that can be trained, but not estimated
        return f"memory unknown: {error}"


def written(config: RunConfig) -> str:
    """Return what a run writes into its directory, and beside it."""
    every = config.checkpoint.save_interval
    when = f"every {every} iterations and at the end" if every else "at the end"
    places = {
        "config.yaml": "this configuration",
        "mixing.jsonl": "every update of the weights",
        "signals.bin": "what they were measured from",
        "metrics.jsonl": "losses, throughput",
        "ledger.jsonl": "what was drawn",
        "tensorboard/": "the same as curves",
        "checkpoints/": when,
        config.data.prepared_dir: "prepared sources, packings (not in the run's directory)",
    }
    return "\n".join(f"  {name:<14}  {what}" for name, what in places.items())


def mix_warnings(config: RunConfig) -> list[str]:
    """Return a line for each setting with which the strategy changes weights late, or never."""
    mixing, lines = config.mixing, _late_changes(config.mixing)
    if not any(mixing.chosen.needs):
        return lines
    if config.training.train_iters is not None and mixing.interval >= config.training.train_iters:
        lines.append(
            f"WARNING: the first weight update is due after iteration {mixing.interval}, the run ends at "
            f"{config.training.train_iters}: its weights will never change; give a shorter --interval"
        )
    idle = [name for name, source in config.data.sources.items() if source.weight == 0]
    if most := config.logging.most_of(idle):
        idle[most:] = [f"{len(idle) - most:,} more"]
    if idle and mixing.signal == "train":
        lines.append(
            f"WARNING: {', '.join(idle)} begin with weight 0, so training measures nothing of them, and no "
            "weight can change; give them a small weight, or --signal probe"
        )
    return lines


def _late_changes(mixing: MixingConfig) -> list[str]:
    """Return a line if a plan made beforehand is to change weights where there is no update."""
    points: dict[str, list[int]] = {
        "schedule": [point[0] for point in mixing.schedule or ()],
        "sequential": [mixing.options.get("every", 0)],
    }
    late = ", ".join(str(point) for point in points.get(mixing.strategy, ()) if point % mixing.interval)
    text = (
        f"WARNING: {mixing.strategy} is to change the weights at {late}, between two updates (--interval "
        f"{mixing.interval}); they will change at the update that follows"
    )
    return [text] if late else []


def router_lines(config: RunConfig, reports: Sequence[SourceReport]) -> list[str]:
    """Say how strong auxiliary losses are, and how far training moves an expert bias that it was given."""
    lines, model = [], model_settings(config)
    if losses := aux_losses(model):
        terms = " + ".join(f"{coefficient} x {name}" for name, coefficient in losses.items())
        lines.append(f"\nadded to the loss in each MoE layer: {terms}, means over all tokens but padding")
        factors = {
            report.tokens / report.trained_tokens: report.name
            for report in reports
            if report.name in config.data.sources and report.trained_tokens
        }
        least, most = min(factors, default=1.0), max(factors, default=1.0)
        if most > NOTABLE_FACTOR:
            lines.append(
                "whatever is trained on: Megatron-LM's per-token loss would make them about "
                f"{least:.1f} ({factors[least]}) to {most:.1f} ({factors[most]}) times as strong"
            )
    rate, iterations = model.moe_router_bias_update_rate, config.training.train_iters or 0
    given = config.model.load_hf or config.checkpoint.pretrained_checkpoint
    if given and model.moe_router_enable_expert_bias and rate and not config.model.freeze_router:
        lines.append(
            f"\nthe expert bias of {given} moves: by {rate} an iteration for each expert, so in {iterations} "
            f"by {rate * iterations:.4g} at most, where scores are 0 to 1; keep it by --freeze-router or "
            "--moe-router-bias-update-rate 0"
        )
    return lines
