"""What mixing adds to an iteration of stock Megatron-LM: its own loop, with it and without.

Two jobs run the same script on the same data, in freshly forked ranks, and train an iteration each in turn:
what else the machine does it does to both. Compared is the CPU time of iterations that stand side by side,
which with one rank and thread is the time of one on a machine that does nothing else. Needs
`megatron.training`: the environment of `make test-newest`, or DYNMIX_MEGATRON_LM, the folder of a tag.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from select import PIPE_BUF

sys.path.append(str(Path(__file__).parents[1]))

from megatron_dynmix.records.text_table import table
from tests.distributed.ranks import CONTEXT
from tests.stock import data, engine

TARGET = 1.02
MODEL = [
    *("--num-layers", "4", "--hidden-size", "128", "--ffn-hidden-size", "256"),
    *("--moe-ffn-hidden-size", "256"),
    *("--seq-length", "256", "--max-position-embeddings", "256", "--micro-batch-size", "4"),
    *("--eval-iters", "0", "--split", "100,0,0", "--log-interval", "10"),
]
WARM_UP = 3
"""Iterations that are left out."""
LEAST = WARM_UP + 5


def iteration_times(argv: list[str], folder: Path, turns: tuple[Path, Path], *, mixed: bool) -> list[float]:
    """Return the milliseconds of the iterations of one run, which take turns with those of another."""
    log = folder / f"log-{mixed}"
    try:
        ((code, text),) = engine.run_stock(1, argv, log, mixed=mixed, turns=turns, timeout=1800)
    finally:  # the other need not wait for a job that has failed
        with turns[1].open("r+b", buffering=0) as other:
            other.write(b"." * PIPE_BUF)
    assert code == 0, text[-3000:]
    clock = [1000 * float(seconds) for seconds in re.findall(r"cpu seconds: ([\d.]+)", text)]
    return [after - before for before, after in pairwise(clock)]


def main() -> None:
    """Run both and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.iterations < LEAST:
        parser.error(f"--iterations {arguments.iterations} is too few for quartiles; give at least {LEAST}")
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
        mixing = ["--dynmix-strategy", "uniqueness", "--dynmix-interval", "10"]
        mixing += ["--dynmix-run-dir", str(folder / "run")]
        first, second = folder / "first", folder / "second"
        for pipe in (first, second):
            os.mkfifo(pipe)
        # bytes are kept as long as somebody has the pipe open
        held = [os.open(pipe, os.O_RDWR) for pipe in (first, second)]
        os.write(held[0], b".")
        with ThreadPoolExecutor() as both:
            plain = both.submit(iteration_times, argv, folder, (first, second), mixed=False)
            mixed = both.submit(iteration_times, [*argv, *mixing], folder, (second, first), mixed=True)
            pairs = list(zip(plain.result(), mixed.result(), strict=True))[WARM_UP:]
        for descriptor in held:
            os.close(descriptor)
    ratios = [with_it / without for without, with_it in pairs]
    ratio = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios)
    rows = [
        ("plain", *spread([without for without, _ in pairs])),
        ("mixed", *spread([with_it for _, with_it in pairs])),
    ]
    print(table(["stock Megatron-LM", "ms per iteration", "mean"], rows))
    print(f"median ratio of {len(ratios)} pairs of iterations: {ratio:.4f} (quartiles {low:.4f}, {high:.4f})")
    print(f"target: at most {TARGET}: {'held' if ratio <= TARGET else 'MISSED'}")


def spread(times: list[float]) -> tuple[str, str]:
    """Return the median, and the mean: it has the iterations after which weights are updated in it."""
    return f"{statistics.median(times):.1f}", f"{statistics.fmean(times):.1f}"


if __name__ == "__main__":
    main()
