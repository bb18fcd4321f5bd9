"""The picture of docs/algorithm.md: from gate loads to likeness to weights, with the rules themselves.

    python tools/picture_of_uniqueness.py docs/images/uniqueness.svg

Axes: D sources, E experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_dynmix.mixing.strategies.gate_load import GateLoad
from megatron_dynmix.mixing.strategies.uniqueness import Uniqueness, likeness
from megatron_dynmix.mixing.strategy import Signal

NAMES = ("chat", "code", "math", "math again")
COUNTS_DE = np.array(
    [
        [30, 26, 16, 9, 5, 5, 5, 4],
        [6, 8, 11, 28, 25, 12, 5, 5],
        [5, 5, 10, 12, 15, 14, 20, 19],
        [5, 5, 10, 12, 15, 14, 20, 19],
    ]
)
UPDATES = 20
BLUE, ORANGE, GREY = "#3b6fb6", "#d98032", "#9a9a9a"
TOP, ROW, BAR = 62, 46, 12


def weights() -> dict[str, tuple[str, Sequence[float]]]:
    """Return the weights of each rule with its color, and for `likeness` what they come from."""
    signal = Signal(counts_DLE=COUNTS_DE[:, None])
    even_D = published_D = np.full(len(NAMES), 1 / len(NAMES))
    rule = GateLoad()
    for _ in range(UPDATES):
        published_D = rule.propose(published_D, signal, {}).weights_D
    unique_D = Uniqueness(min_gap=0).propose(even_D, signal, {}).weights_D
    return {
        "uniform": (GREY, even_D.tolist()),
        f"gate-load, after {UPDATES} updates": (ORANGE, published_D.tolist()),
        "uniqueness": (BLUE, unique_D.tolist()),
    }


def svg() -> str:
    """Return the picture."""
    height = TOP + len(NAMES) * ROW + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 904 {height}" font-family="sans-serif" '
        'font-size="13" fill="#111">',
        f'<rect width="904" height="{height}" rx="8" fill="#ffffff"/>',
        *_loads(),
        *_likeness(),
        *_weights(),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, text: str, **more: object) -> str:
    given = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:g}" y="{y:g}"{given}>{text}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _loads() -> Iterator[str]:
    load_DE = COUNTS_DE / COUNTS_DE.sum(axis=1, keepdims=True)
    yield _text(105, 30, "1  load of each expert", font_weight="bold")
    for source, name in enumerate(NAMES):
        floor = TOP + (source + 1) * ROW - 8
        yield _text(95, floor - 10, name, text_anchor="end")
        for expert, load in enumerate(load_DE[source]):
            yield _box(105 + 18 * expert, floor - 110 * load, 15, 110 * load, BLUE)


def _likeness() -> Iterator[str]:
    alike_DD = likeness(Signal(counts_DLE=COUNTS_DE[:, None]), "all", 0.0, "the picture").alike_DD
    yield _text(300, 30, "2  likeness of each two", font_weight="bold")
    for row, column in np.ndindex(*alike_DD.shape):
        alike = float(alike_DD[row, column])
        shade = "#" + "".join(
            f"{round(255 - alike * (255 - int(BLUE[n : n + 2], 16))):02x}" for n in (1, 3, 5)
        )
        x, y = 300 + ROW * column, TOP + ROW * row
        yield _box(x, y, ROW - 2, ROW - 2, shade)
        ink = "#fff" if alike > 0.5 else "#111"
        yield _text(x + ROW / 2 - 1, y + ROW / 2 + 4, f"{alike:.2f}", text_anchor="middle", fill=ink)


def _weights() -> Iterator[str]:
    yield _text(520, 30, "3  weights", font_weight="bold")
    for place, (rule, (colour, weights_D)) in enumerate(weights().items()):
        for source, weight in enumerate(weights_D):
            y = TOP + ROW * source + BAR * place + 4
            yield _box(520, y, max(340 * weight, 1), BAR - 2, colour)
            yield _text(526 + 340 * weight, y + BAR - 3, f"{weight:.2f}", font_size=11, fill="#333")
        x, y = 520 + (0, 75, 262)[place], TOP + len(NAMES) * ROW + 16
        yield _box(x, y, 10, 10, colour)
        yield _text(x + 14, y + 10, rule, font_size=12)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", type=Path, metavar="PICTURE.svg")
    parser.parse_args().picture.write_text(svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
