"""What a run says before it starts: its configuration, what became of the data, what was changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.load import to_yaml
from megatron_dynmix.config.megatron_fields import model_settings
from megatron_dynmix.config.run_config import MixingConfig
from megatron_dynmix.data.prepare.notices import HINTS
from megatron_dynmix.data.prepared import SourceReport, file_of, read_digests, shared_texts
from megatron_dynmix.data.row_text import excerpt, plain, row_text
from megatron_dynmix.data.rows import PackedRows
from megatron_dynmix.data.sources import SourceFile, source_files
from megatron_dynmix.errors import InputError
from megatron_dynmix.mixing.weights import example_shares
from megatron_dynmix.moe.balance import aux_losses
from megatron_dynmix.plan.parameters import this_host
from megatron_dynmix.plan.plan import Plan, SourceWork
from megatron_dynmix.plan.text import epochs_table, memory_text, model_line, needs_line
from megatron_dynmix.records.text_table import table
from megatron_dynmix.training.setup import PreparedRun

SHOWN_LINES = 10
"""Lines of a row at the start of the log."""
NOTABLE_FACTOR = 1.1
"""Real / trained tokens from which a coefficient that was tuned elsewhere means something else here."""
NOTABLE_DROP = 0.1
"""Share of a source's examples whose loss deserves a line of its own."""


def report_start(prepared: PreparedRun, run_dir: Path, changes: Sequence[str], notes: Sequence[str]) -> None:
    """Print everything a user should see once, on one rank.

    `changes` are settings that are not those of the checkpoint, `notes` tell of checkpoints not used.
    """
    config, data = prepared.config, prepared.data
    print(f"------------------------ arguments ------------------------\n{to_yaml(config).rstrip()}")
    print("-------------------- end of arguments ---------------------")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    lines = [
        prepared_table(data.reports),
        *shared_lines(list(source_files(config)), config),
        f"\n{packed_table([*data.train, *data.probe])}",
        f"\n{share_table(data.train, prepared.mix.initial_D)}",
        f"\n{overview(prepared, world_size)}",
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
        lines = [model_line(plan), f"layout   {plan.layout.describe()}", epochs_table(plan, works)]
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


def prepared_table(reports: Sequence[SourceReport]) -> str:
    """Show what became of each input's examples; the first broken rows by file and line."""
    header = [
        *("source", "examples", "tokens", "trained", "mean length", "longest"),
        *("broken", "untrained", "duplicates", "split", "held out"),
    ]
    rows = [
        [
            *(report.name, report.examples, report.tokens, report.trained_tokens),
            *(f"{report.mean_length:.1f}", report.max_length, report.broken, report.untrained),
            *(report.duplicates, report.split, report.held_out),
        ]
        for report in reports
    ]
    broken = [f"  broken: {line}" for report in reports for line in report.first_broken]
    notices = [f"  {line}" for report in reports for line in notice_lines(report)]
    return "\n".join([table(header, rows), *broken, *notices])


def notice_lines(report: SourceReport) -> list[str]:
    """Return a line for each thing that rows of a source, or its folder, have and a user should know of."""
    lines = [
        f"{report.name}: {one.kind}{f' {one.detail}' if one.detail else ''} in "
        f"{one.rows:,} row{'s' if one.rows > 1 else ''} (first: {one.first}): {HINTS[one.kind]}"
        for one in report.notices
    ]
    if report.unread:
        lines.append(f"{report.name}: not read: {', '.join(report.unread)}: no names that rows are read from")
    return lines


def shared_lines(files: Sequence[SourceFile], config: RunConfig) -> list[str]:
    """Return a line for each two inputs with texts in common, from the digests beside their files."""
    digests = [read_digests(file_of(file.prefix(config), "digests")) for file in files]
    lines = []
    for shared in shared_texts(digests):
        first, second = files[shared.first], files[shared.second]
        texts = "1 text stands" if shared.texts == 1 else f"{shared.texts} texts stand"
        why = "that much of their gate loads is alike for no other reason"
        if first.is_probe != second.is_probe:
            why = "what is trained on is not held out, so its gate loads and losses mislead"
        lines.append(f"WARNING: {texts} in both {first.label} and {second.label}: {why}")
    return lines


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
            if report.probe_of is None and report.trained_tokens
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


def share_table(rows: Sequence[PackedRows], row_shares_D: NDArray[np.float64]) -> str:
    """Show the sources' weights before a strategy changes them: shares of the rows, and of the examples."""
    per_row_D = np.array([source.mean_examples_per_row for source in rows])
    shares = zip(rows, per_row_D, row_shares_D, example_shares(row_shares_D, per_row_D), strict=True)
    lines = [
        [source.name, f"{per_row:.2f}", f"{of_rows:.4f}", f"{of_examples:.4f}"]
        for source, per_row, of_rows, of_examples in shares
    ]
    return table(["source", "examples a row", "share of rows", "share of examples"], lines)


def packed_table(sources: Sequence[PackedRows]) -> str:
    """Show what became of each source's examples in packing, and a line where many were lost."""
    header = ["source", "rows", "examples", "over-long dropped", "truncated", "untrained", "useful tokens"]
    reports = [(rows.name, rows.packing_report) for rows in sources]
    lines = [
        [
            *(name, report.rows, report.examples, report.dropped_overlong, report.truncated),
            *(report.untrained, f"{report.useful_token_share:.3f}"),
        ]
        for name, report in reports
    ]
    notes = []
    for name, report in reports:
        lost = report.dropped_overlong / (report.examples + report.dropped_overlong + report.untrained)
        if lost > NOTABLE_DROP:
            notes.append(
                f"WARNING: {lost:.0%} of the examples of {name} are longer than seq_length and were dropped; "
                "raise --seq-length, or keep their beginning with --overlong truncate"
            )
    return "\n".join([table(header, lines), *notes])
