"""The tables of the study, from what `compare` wrote: losses by kind of data, and the last mix."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dynmix.compare.page import difference_text, spread_text
from megatron_dynmix.compare.results import BASELINE, Difference, paired_difference, spread

COPIES = ("twice", "thrice", "halves", "filtered", "sweeps-twice")
"""Parts in which `math-2` and the like are of the kind `math`, and count once."""
HEADER = [
    "variant",
    "seeds",
    "mean over kinds",
    "to uniform",
    "worst kind",
    "worst, to uniform",
    "weights at the end",
]
MOTION = {"settled": 0, "turns": 1, "path": 2}
"""How weights moved, which sweeps are asked about -> decimals."""


def part(name: str, comparisons: Mapping[str, Path]) -> str:
    """Return the tables of one part: one for each start that was run.

    Args:
        name: of the part.
        comparisons: start -> its `comparison.json`.

    """
    lines = [f"## {name.capitalize()}"]
    for start, path in comparisons.items():
        lines += ["", f"From {start} weights:" if start != "frozen" else "Pretrained, routers frozen:", ""]
        motion = MOTION if name.startswith("sweeps") else {}
        lines += table(json.loads(path.read_text()), by_kind=name in COPIES, motion=motion)
    return "\n".join(lines)


def table(found: Mapping[str, Any], *, by_kind: bool, motion: Mapping[str, int] | None = None) -> list[str]:
    """Return one comparison in Markdown; losses in nats per trained token, mean ± sd over seeds.

    `motion` adds columns of how the weights moved, each with so many decimals; means over seeds.
    """
    motion = motion or {}
    moved = {variant["name"]: variant["motion"] for variant in found["variants"]} if motion else {}
    cells: dict[str, dict[int, Any]] = {}
    for cell in found["cells"]:
        cells.setdefault(cell["variant"], {})[cell["seed"]] = cell
    losses = {
        variant: {seed: kinds(cell["metrics"], by_kind=by_kind) for seed, cell in own.items()}
        for variant, own in cells.items()
    }
    header = [*HEADER, *motion]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for variant, own in losses.items():
        row = [variant, str(len(own))]
        for measure in (statistics.fmean, max):
            values = {seed: measure(list(by_name.values())) for seed, by_name in own.items()}
            base = {
                seed: measure(list(by_name.values())) for seed, by_name in losses.get(BASELINE, {}).items()
            }
            row += [spread_text(spread(list(values.values()))), _difference(variant, values, base)]
        row.append(_weights(found["sources"], list(cells[variant].values())))
        row += [f"{moved[variant][name]['mean']:.{decimals}f}" for name, decimals in motion.items()]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def kinds(metrics: Mapping[str, float], *, by_kind: bool) -> dict[str, float]:
    """Return the held-out loss of each kind of data; copies have the same held-out rows, and count once."""
    losses: dict[str, list[float]] = {}
    for key, loss in metrics.items():
        if key.startswith("loss/"):
            name = key.removeprefix("loss/")
            losses.setdefault(name.partition("-")[0] if by_kind else name, []).append(loss)
    return {kind: statistics.fmean(same) for kind, same in losses.items()}


def _difference(variant: str, values: Mapping[int, float], base: Mapping[int, float]) -> str:
    both = [seed for seed in values if seed in base]
    if variant == BASELINE or not both:
        return "-"
    found: Difference = paired_difference([values[seed] for seed in both], [base[seed] for seed in both])
    text = difference_text(found)
    return f"**{text}**" if found.is_clear else text


def _weights(sources: Sequence[str], cells: Sequence[Mapping[str, Any]]) -> str:
    means = {
        name: statistics.fmean(cell["weights"][-1][1][place] for cell in cells)
        for place, name in enumerate(sources)
    }
    if len(means) > 7:
        high = max(means, key=lambda name: means[name])
        low = min(means, key=lambda name: means[name])
        return f"{low} {means[low]:.3f} to {high} {means[high]:.3f}"
    return ", ".join(f"{name} {weight:.3f}" for name, weight in means.items())
