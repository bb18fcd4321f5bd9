"""A run in words: what it is, how far it is, what became of the mix and why, and what to look at."""

from __future__ import annotations

import math
from datetime import timedelta

from megatron_dynmix.mixing.trajectory import motion
from megatron_dynmix.report.run import Run
from megatron_dynmix.report.tables import pairs

STILL = 120
"""Seconds since the last record after which a run that is not finished is no longer said to be written."""
SETTLED = 0.01
"""A share that no weight moved by more than in the last quarter of the updates."""
MANY_EPOCHS = 4
"""Repeating data more often brings little (Muennighoff et al., 2023)."""
TINY, HUGE = 0.01, 0.9
COSTLY = 0.05
UNEVEN = 4.0
MANY_TURNS, LONG_WAY = 5, 4.0


def summary(run: Run, now: float) -> list[str]:
    """Return sentences, the most important first; `now` is in seconds since 1970."""
    return [sentence for sentence in (_what(run), _state(run, now), _loss(run), *_mix(run)) if sentence]


def _what(run: Run) -> str:
    strategy = run.setting("mixing", "strategy")
    parts = [f"{len(run.sources)} sources" if len(run.sources) != 1 else "One source"]
    if preset := run.setting("model", "preset"):
        parts.append(f"model {preset}")
    if strategy and run.keeps_weights:
        parts.append(f"strategy {strategy}, which keeps the weights that it begins with")
    elif strategy:
        interval = run.setting("mixing", "interval")
        signal = run.setting("mixing", "signal")
        every = f", updated every {interval} iterations" if interval else ""
        measured = f", measured on {'held-out rows' if signal == 'probe' else 'training'}" if signal else ""
        parts.append(f"strategy {strategy}{every}{measured}")
    return "; ".join(parts) + "." if run.sources or strategy else ""


def _state(run: Run, now: float) -> str:
    if run.written is None or not run.iteration:
        return "No iteration is on record."
    total = run.train_iters
    if run.is_finished:
        state = f"It is finished: {run.iteration:,} iterations"
    elif total is None:
        state = f"It is at iteration {run.iteration:,}; how far it is to go is not known"
    else:
        state = f"It is at iteration {run.iteration:,} of {total:,} ({run.iteration / total:.0%})"
    if run.metrics and run.metrics[-1].tokens:
        state += f", {sum(run.metrics[-1].tokens.values()):,} tokens trained on"
    if run.is_finished:
        return f"{state}."
    age = max(0, round(now - run.written))
    writing = "it may still be running" if age < STILL else "it has stopped or was killed, or takes long"
    return f"{state}. Its last record was {timedelta(seconds=age)} old when this page was made: {writing}."


def _loss(run: Run) -> str:
    losses = [record.lm_loss for record in run.metrics if math.isfinite(record.lm_loss)]
    if len(losses) < 2:
        return ""
    verb = "fell" if losses[-1] < losses[0] else "rose"
    return f"The training loss {verb} from {losses[0]:.3f} to {losses[-1]:.3f} nats per token."


def _mix(run: Run) -> list[str]:
    if not run.weights:
        return []
    first, last = run.weights[0].shares, run.weights[-1].shares
    moved = {name: last.get(name, 0.0) - first.get(name, 0.0) for name in run.sources}
    if not moved or max(map(abs, moved.values())) < 1e-6:
        return ["The mix did not change: every source ended with the weight it began with."]
    won, lost = max(moved, key=moved.__getitem__), min(moved, key=moved.__getitem__)

    def course(name: str) -> str:
        return f"{name}, from {first.get(name, 0.0):.1%} to {last.get(name, 0.0):.1%} of the rows"

    went = f"Weight went most to {course(won)}, and away from {course(lost)}."
    return [went + _why(run, won, lost), _nearest(run), _settled(run)]


def _why(run: Run, won: str, lost: str) -> str:
    """Say what the deltas tell about it."""
    means = _mean_deltas(run)
    if len(means) < 2 or not {won, lost} <= set(means):
        return ""
    ranked = sorted(means, key=lambda name: -means[name])
    said = [f"{name} is {means[name]:.4g}, {_rank(ranked, name)}" for name in (won, lost)]
    text = f" The mean delta of {said[0]}, that of {said[1]}"
    if run.load_frames and run.setting("mixing", "strategy") == "gate-load":
        text += ": the larger it is, the less a source loads the experts as the others do"
    return f"{text}."


def _rank(ranked: list[str], name: str) -> str:
    place = ranked.index(name)
    if place in (0, len(ranked) - 1):
        return "the lowest" if place else "the highest"
    return f"number {place + 1} of {len(ranked)}"


def _mean_deltas(run: Run) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for update in run.updates:
        for name, delta in update.delta.items():
            if math.isfinite(delta):
                sums.setdefault(name, []).append(delta)
    return {name: sum(deltas) / len(deltas) for name, deltas in sums.items()}


def _nearest(run: Run) -> str:
    found = pairs(run.distance_frames[-1]) if run.distance_frames else []
    if len(found) < 2:
        return ""
    (near, one, other), (far, this, that) = found[0], found[-1]
    return (
        f"{one} and {other} load the experts most alike (distance {near:.3g}): to this model they are the "
        f"most redundant pair. {this} and {that} are the farthest apart ({far:.3g})."
    )


def _settled(run: Run) -> str:
    if len(run.weights) < 8:
        return ""
    quarter = run.weights[-len(run.weights) // 4 :]
    moves = {
        name: max(spread) - min(spread)
        for name in run.sources
        if (spread := [point.shares.get(name, 0.0) for point in quarter])
    }
    most = max(moves, key=lambda name: moves[name])
    if moves[most] <= SETTLED:
        return (
            "The mix has settled: in the last quarter of its stages no share changed by more than "
            f"{100 * SETTLED:.0f} point."
        )
    return (
        f"The mix still moves: in the last quarter of its stages the share of {most} changed by "
        f"{100 * moves[most]:.1f} points."
    )


def warnings(run: Run) -> list[str]:
    """Return what somebody who watches the run should look at."""
    found = [f"{sentence}." for sentence in run.missing]
    if run.weights:
        last = run.weights[-1].shares
        if tiny := [name for name, share in last.items() if share < TINY and len(last) * TINY < 0.5]:
            found.append(f"Hardly drawn any more, under {TINY:.0%} of the rows: {_names(tiny)}.")
        huge = [name for name, share in last.items() if share > HUGE and len(last) > 1]
        found += [f"{name} has over {HUGE:.0%} of the rows: the mix has collapsed on it." for name in huge]
        if len(set(map(frozenset, (point.shares for point in run.weights)))) == 1:
            found += _turning(run)
    if run.updates:
        if often := [name for name, epochs in run.updates[-1].epochs.items() if epochs > MANY_EPOCHS]:
            found.append(
                f"Drawn more than {MANY_EPOCHS} times over, where repeating brings little: {_names(often)}; "
                "max_epochs limits it."
            )
        if noisy := _noisy(run):
            found.append(noisy)
        busiest = [max(update.use.busiest) for update in run.updates if update.use]
        if busiest and busiest[-1] > UNEVEN:
            found.append(f"The busiest expert takes {busiest[-1]:.1f} times the mean load.")
    share = run.step_seconds and run.mixing_seconds / (run.mixing_seconds + run.step_seconds)
    if share > COSTLY:
        found.append(
            f"Mixing takes {share:.0%} of the time; a longer interval, fewer probe tokens or signal: train "
            "make it cheaper."
        )
    if faults := [event for event in run.events if event.kind == "fault"]:
        iteration, text = faults[-1].iteration, faults[-1].text.rstrip(".")
        found.append(f"Faults: {len(faults)}, the last at iteration {iteration}: {text}.")
    return found


def _turning(run: Run) -> list[str]:
    """Whether the weights go to and fro, so that most of their way leads nowhere."""
    moved = motion(
        [point.iteration for point in run.weights],
        [[point.shares[name] for name in run.sources] for point in run.weights],
    )
    if moved.turns < MANY_TURNS or moved.path < LONG_WAY * moved.net:
        return []
    return [
        f"The weights go to and fro: {moved.turns} changes of direction, and a way {moved.path:.2f} long "
        f"that led {moved.net:.2f} far. A longer interval, more probe tokens, max_kl_step, or average where "
        "the strategy has it, calm them."
    ]


def _noisy(run: Run) -> str:
    """Whether the differences of the last deltas are within their standard errors."""
    update = run.updates[-1]
    deltas = [delta for delta in update.delta.values() if math.isfinite(delta)]
    errors = [error for error in update.delta_error.values() if math.isfinite(error)]
    if len(deltas) < 2 or not errors or max(deltas) - min(deltas) > 2 * max(errors):
        return ""
    return (
        "At the last update the deltas differ by less than twice their standard error: what the weights "
        "follow is noise. More probe tokens help."
    )


def _names(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
