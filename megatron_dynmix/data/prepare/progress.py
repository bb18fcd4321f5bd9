"""How far a long command has come: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from contextlib import AbstractContextManager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """Shows how much is done, on standard error."""

    def __init__(self, name: str, total_bytes: int | None) -> None:
        """Begin at 0; ``total_bytes`` is None where it is not known, as for compressed files."""
        self._name = name
        self._total = total_bytes
        self._done = self._examples = 0
        self._last_line = time.monotonic()
        shown = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_bytes, desc=name, unit="B", unit_scale=True, leave=False, disable=not shown
        )

    def advance(self, done_bytes: int, examples: int = 0) -> None:
        """Add what is done: bytes, and the examples that came of them."""
        self._done += done_bytes
        self._examples += examples
        self._bar.update(done_bytes)
        if self._bar.disable and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            far = f"{self._done / self._total:.0%}" if self._total else f"{self._done >> 20} MiB"
            made = f", {self._examples} examples" if self._examples else ""
            print(f"{self._name}: {far}{made}", file=sys.stderr, flush=True)

    def __exit__(self, *raised: object) -> None:
        """Take the bar away."""
        self._bar.close()
