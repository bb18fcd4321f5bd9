"""What mixing adds to an iteration of stock Megatron-LM: paired runs of its own loop, with it and without.

Both run the same script on the same data in freshly forked ranks, one after the other, the order swapped
from pair to pair. Compared are the medians of the CPU time from one report of stock's to the next: with one
rank and thread that is the time of an iteration on a machine that does nothing else. Needs
`megatron.training`: the environment of `make test-newest`, or DYNMIX_MEGATRON_LM, the folder of a tag.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from megatron_dynmix.records.text_table import table
from tests.distributed.ranks import CONTEXT
from tests.stock import data, engine

TARGET = 1.02
MODEL = [
    *("--num-layers", "4", "--hidden-size", "128", "--ffn-hidden-size", "256"),
    *("--moe-ffn-hidden-size", "256"),
    *("--seq-length", "256", "--max-position-embeddings", "256", "--micro-batch-size", "4"),
    *("--eval-iters", "0", "--split", "100,0,0"),
]
WARM_UP = 3
"""Iterations that are left out."""


def iteration_time(argv: list[str], folder: Path, *, mixed: bool) -> float:
    """Return the median milliseconds of an iteration of one run."""
    ((code, text),) = engine.run_stock(1, argv, folder / "log", mixed=mixed, clock=True, timeout=900)
    assert code == 0, text[-3000:]
    clock = [float(seconds) for seconds in re.findall(r"cpu seconds: ([\d.]+)", text)]
    return 1000 * statistics.median(after - before for before, after in pairwise(clock[WARM_UP:]))


def main() -> None:
    """Run the pairs and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=30)
    arguments = parser.parse_args()
    if not engine.find_stock():
        print("skipped: there is no megatron.training here; use the environment of `make test-newest`")
        return
    CONTEXT.set_forkserver_preload(["tests.distributed.preload", "tests.stock.preload"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefixes = data.write_sources(folder, documents=400)
        blend = [word for prefix in prefixes for word in ("1", prefix)]
        argv = ["--data-path", *blend, "--data-cache-path", str(folder / "cache"), *MODEL]
        argv += ["--train-iters", str(arguments.iterations)]
        mixing = ["--dynmix-strategy", "gate-load", "--dynmix-interval", "10", "--dynmix-run-dir"]
        pairs = []
        for pair in range(arguments.pairs):
            times = {}
            for mixed in (False, True) if pair % 2 else (True, False):
                flags = [*mixing, str(folder / f"run{pair}")] if mixed else []
                times[mixed] = iteration_time([*argv, *flags], folder, mixed=mixed)
            pairs.append((times[False], times[True]))
            print(f"pair {pair + 1}: {times[True] / times[False]:.4f}", file=sys.stderr)
    ratios = [with_it / without for without, with_it in pairs]
    ratio = statistics.median(ratios)
    rows = [
        ("plain", f"{statistics.median(without for without, _ in pairs):.1f}"),
        ("mixed", f"{statistics.median(with_it for _, with_it in pairs):.1f}"),
    ]
    print(table(["stock Megatron-LM", "ms per iteration"], rows))
    print(f"median ratio of {len(ratios)} pairs: {ratio:.4f} (from {min(ratios):.4f} to {max(ratios):.4f})")
    print(f"target: at most {TARGET}: {'held' if ratio <= TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
