"""Log lines in Megatron-LM's exact shape, which people's scripts grep, and our table of a weight update.

Pure functions: they return the text and print nothing. `now` is the time to stamp the line with.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from textwrap import indent

from megatron_dynmix.records.schema import MixingUpdate, TrainingRecord
from megatron_dynmix.records.text_table import first_of, foremost, foremost_rows

STAND_STILL = ("kept", "override_unusable", "override_not_followed")
"""Kinds of notes on weights that are not what strategy or operator would have them be."""
MOST_LETTERS = 300
"""Of a text that names very many sources."""


def training_line(record: TrainingRecord, train_iters: int, now: datetime) -> str:
    """Return the line of a log interval: Megatron-LM's fields in its order, then tokens/s and useful tokens.

    The loss is not scaled, as in bf16, and an iteration that is not a number stops the run or is skipped, so
    Megatron-LM's fields for those do not vary.
    """
    losses = {"lm loss": record.lm_loss, **record.aux_losses}
    fields = [
        f" {_stamp(now)} iteration {record.iteration:8d}/{train_iters:8d} |",
        f" consumed samples: {record.consumed_samples:12d} |",
        f" elapsed time per iteration (ms): {record.seconds * 1000.0:.1f} |",
        f" learning rate: {record.lr:.6E} |",
        f" global batch size: {record.global_batch_size:5d} |",
        *(f" {name}: {loss:.6E} |" for name, loss in losses.items()),
        " loss scale: 1.0 |",
        f" grad norm: {record.grad_norm:.3f} |",
        f" number of skipped iterations: {record.skipped_iterations:3d} |",
        " number of nan iterations:   0 |",
        f" tokens per second: {record.tokens_per_second:.1f} |",
        f" useful token share: {record.useful_token_share:.3f} |",
    ]
    return "".join(fields)


def source_loss_line(record: TrainingRecord, most: int | None = None) -> str:
    """Return the loss of each source in a log interval, on a line of its own; "-" for one not drawn in it.

    Of more than `most` sources, those with the highest losses.
    """
    losses = list(record.source_loss.items())
    shown = foremost(list(record.losses.values()), most)
    fields = [f"{name}: {'-' if loss is None else f'{loss:.6E}'}" for name, loss in losses]
    if len(shown) < len(losses):
        fields = [fields[place] for place in shown if losses[place][1] is not None]
        fields.append(f"the highest of {len(losses):,}")
    return f" lm loss per source at iteration {record.iteration:8d} |" + "".join(f" {it} |" for it in fields)


def saving_line(iteration: int, directory: Path, now: datetime) -> str:
    """Return the line before a checkpoint is written into `directory` (the parent of `iter_*`)."""
    return f"{_stamp(now)} saving checkpoint at iteration {iteration:7d} to {directory} in torch_dist format"


def saved_line(iteration: int, directory: Path, now: datetime, *, tp_size: int, pp_size: int) -> str:
    """Return the line once a checkpoint is whole, as the first tensor- and pipeline-parallel rank says it."""
    return (
        f"{_stamp(now)} successfully saved checkpoint from iteration {iteration:7d} to {directory} "
        f"[ t 1/{tp_size}, p 1/{pp_size} ]"
    )


def loading_line(iteration: int, directory: Path) -> str:
    """Return the line before a checkpoint is read."""
    return f" loading distributed checkpoint from {directory} at iteration {iteration}"


def loaded_line(iteration: int, directory: Path, *, tp_size: int, pp_size: int) -> str:
    """Return the line once a checkpoint is read, as the first tensor- and pipeline-parallel rank says it."""
    return (
        f"  successfully loaded checkpoint from {directory} "
        f"[ t 1/{tp_size}, p 1/{pp_size} ] at iteration {iteration}"
    )


def mixing_table(update: MixingUpdate, most: int | None = None) -> str:
    """Return a plain table of one weight update, one line per source.

    Columns: weight before, after and the change between them; delta ("-" where the strategy has none);
    tokens drawn and epochs seen so far. Below them the weights that shadows would have, what guardrails and
    the operator did, and a note. ASCII but for the sources' names. Of more than `most` sources it shows those
    whose weights change most, and of as many texts the beginning.
    """
    names = update.sources
    deltas = [math.nan] * len(names) if update.delta is None else update.delta
    header, rows = ["source", "old weight", "", "new weight", "change", "delta", "tokens", "epochs"], []
    for name, before, after, delta, seen, epoch in zip(
        names, update.old_weights, update.new_weights, deltas, update.tokens, update.epochs, strict=True
    ):
        score = "-" if math.isnan(delta) else f"{delta:.4f}"
        weights = (f"{before:.4f}", "->", f"{after:.4f}", f"{after - before:+.4f}")
        rows.append((name, *weights, score, f"{seen:,}", f"{epoch:.2f}"))
    iteration, samples = update.iteration, update.consumed_samples
    lines = [f" weight update at iteration {iteration:8d} | consumed samples: {samples:12d} |"]
    changed = [abs(new - old) for old, new in zip(update.old_weights, update.new_weights, strict=True)]
    shown = foremost(changed, most)
    lines.append(indent(foremost_rows(header, rows, changed, most), "  "))
    if update.example_weights is not None:  # the weights above are shares of the rows
        lines.append(f"  shares of examples: {_shares(names, update.example_weights, shown)}")
    lines += [f"  shadow {label}: {_shares(names, given, shown)}" for label, given in update.shadow.items()]
    longest, most = (None, None) if len(shown) == len(names) else (MOST_LETTERS, most)
    lines += first_of([f"  event: {_cut(event.text, longest)}" for event in update.events], most)
    if update.notes:
        stands_still = any(note.kind in STAND_STILL for note in update.notes)
        text = "; ".join(_cut(note.text, longest) for note in update.notes)
        lines.append(f"  {'WARNING' if stands_still else 'note'}: {text}")
    return "\n".join(lines)


def _shares(names: Sequence[str], weights: Sequence[float], shown: Sequence[int]) -> str:
    more = f", and {len(names) - len(shown):,} more" if len(shown) < len(names) else ""
    return ", ".join(f"{names[place]} {weights[place]:.4f}" for place in shown) + more


def _cut(text: str, longest: int | None) -> str:
    """Return a text without what is more than a log line holds; the records have it whole."""
    fits = longest is None or len(text) <= longest
    return text if fits else f"{text[:longest]} ... (all of it in mixing.jsonl)"


def _stamp(now: datetime) -> str:
    """Megatron-LM's time stamp, to the microsecond."""
    return now.strftime("[%Y-%m-%d %H:%M:%S.%f]")
