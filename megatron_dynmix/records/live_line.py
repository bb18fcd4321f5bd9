"""On a terminal, one line that is always true; log lines go above it. Elsewhere only the log lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

MOST_WEIGHTS = 4
"""Sources whose weights are shown: the heaviest; more do not fit a line."""


class LiveLine:
    """How far a run has come, on standard output; on all ranks but one it is silent."""

    def __init__(self, sources: Sequence[str], train_iters: int, iteration: int, *, silent: bool) -> None:
        self._sources = sources
        self._silent = silent
        self._bar = tqdm(
            total=train_iters,
            initial=iteration,
            unit="it",
            dynamic_ncols=True,
            leave=False,
            file=sys.stdout,
            disable=silent or not sys.stdout.isatty(),
            bar_format="{n_fmt}/{total_fmt} {bar:10} ETA {remaining} | {desc}",
        )

    def say(self, text: str) -> None:
        """Print text above the line."""
        if self._silent:
            return
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def step(self, lm_loss: float, tokens_per_second: float, weights_D: NDArray[np.float64]) -> None:
        """One more iteration is done."""
        if self._bar.disable:
            return
        text = f"loss {lm_loss:.3f} | {tokens_per_second:,.0f} tokens/s | {shares(self._sources, weights_D)}"
        self._bar.set_description_str(text, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Take the line away."""
        self._bar.close()


def shares(sources: Sequence[str], weights_D: NDArray[np.float64]) -> str:
    """Return the heaviest sources with their weights, and how many more there are."""
    order = np.argsort(-weights_D, kind="stable")[:MOST_WEIGHTS]
    shown = " ".join(f"{sources[source]} {weights_D[source]:.2f}" for source in order)
    more = len(sources) - len(order)
    return f"{shown} +{more} more" if more else shown
