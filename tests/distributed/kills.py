"""Kills at random instants: a run that saves every iteration, killed and gone on with until it is done.

Some of the starts come while the run before is still there: it is told to stop and waited for, or it refuses.

`python -m tests.distributed.kills 50` prints the figures; `make soak` calls it.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

from megatron_dynmix.commands.quickstart import make_quickstart
from tests.distributed import programs
from tests.distributed.conftest import SMALL
from tests.distributed.ranks import end_rank, run_ranks, started_ranks

RANKS = 2
LONG = 3600
"""Seconds that a whole run may take."""
SAVING = ["--save-interval", "1", "--interval", "3", "--log-interval", "1"]
CLOCKS = ("seconds", "tokens_per_second")


def settings(iterations, *extra):
    """Flags of the run that is killed."""
    return [*SMALL, *SAVING, "--train-iters", str(iterations), *extra]


def undisturbed(run_yaml, flags, run_dir):
    """What the run writes when nobody kills it, and the seconds from its start to its end."""
    start = time.monotonic()
    result = run_ranks(RANKS, programs.train, run_yaml, flags, run_dir, timeout=LONG)[0]
    return result, time.monotonic() - start


class Killer:
    """Goes on with one run until it is done, killing it `kills` times on the way.

    As often as `overlaps` says, another start comes before the kill.
    """

    def __init__(self, run_yaml, flags, run_dir, *, kills, span, seed, overlaps=0):
        self.run_yaml, self.flags, self.run_dir = run_yaml, flags, run_dir
        self.kills, self.span = kills, span
        self.overlaps, self.second_starts = overlaps, Counter()
        """How many are left, and what became of those that were."""
        self.random = random.Random(seed)
        self.phases = Counter()
        self.lost = 0
        """Iterations that were trained and had to be trained again."""
        self.resumed = 0
        """Starts that went on from a checkpoint: each has loaded the one that the tracker named."""

    def finish(self):
        """The result of the run at last."""
        for _ in range(self.kills):
            if not self._kill_once():
                break
            if self.overlaps:
                self.overlaps -= 1
                self._start_twice()
        return run_ranks(
            RANKS, programs.train, self.run_yaml, self.flags, self.run_dir, resume="auto", timeout=LONG
        )[0]

    def _kill_once(self):
        """Start, wait for an instant, kill; False if the run was done before."""
        named = self.tracker()
        files = set(self._files())
        with self._started() as (processes, pipes):
            self._wait(files, pipes)
            if any(pipe.poll() for pipe in pipes):
                failure, _ = next(pipe for pipe in pipes if pipe.poll()).recv()
                assert failure is None, failure
                return False
            self.random.shuffle(processes)
            for process in processes:  # one after the other: what is left must not tear anything either
                end_rank(process)
                time.sleep(self.random.choice([0, 0.05]))
        trained = self._trained()
        self.resumed += named is not None and trained > named
        self.lost += max(trained - (self.tracker() or 0), 0)
        self.phases[self._phase(named, trained)] += 1
        return True

    def _started(self):
        flags = (self.run_yaml, self.flags, self.run_dir)
        return started_ranks(RANKS, programs.train, *flags, resume="auto")

    def _start_twice(self):
        """Start, and start again at some instant, every other time once the first was told to stop; kill."""
        with self._started() as (processes, pipes):
            self._wait_for_a_save(pipes)
            asked = self.second_starts["waited"] <= self.second_starts["refused"]
            for process in processes if asked else ():
                os.kill(process.pid, signal.SIGTERM)
            with self._started() as (_, second):
                if asked:
                    for process in processes:
                        process.join(timeout=60)
                    self._wait_for_a_save(second)
                else:
                    assert wait([second[0]], 60), "the second start neither trained nor was refused"
                answers = [pipe.recv()[0] for pipe in second if pipe.poll()]
        held = [failure for failure in answers if failure is not None and "is in use by" in failure]
        assert held or not any(answers), answers
        self.second_starts["refused" if held else "waited"] += 1

    def _wait_for_a_save(self, pipes):
        """Until the run under way saves, and a bit longer."""
        files, deadline = set(self._files()), time.monotonic() + 60
        while not set(self._files()) - files and not any(pipe.poll() for pipe in pipes):
            assert time.monotonic() < deadline, "nothing is saved"
            time.sleep(0.005)
        time.sleep(self.random.uniform(0, 0.3))

    def _wait(self, files, pipes):
        """Until an instant of the whole span, or every other time until a save has begun and a bit longer."""
        deadline = time.monotonic() + self.random.uniform(0.1, 1.2) * self.span
        into_a_save = self.random.random() < 0.5
        saves = self.random.randint(1, 3)
        while time.monotonic() < deadline and not any(pipe.poll() for pipe in pipes):
            now = set(self._files())
            if into_a_save and now - files:
                saves -= 1
                files |= now
                if saves == 0:
                    time.sleep(self.random.uniform(0, 0.3))
                    return
            time.sleep(0.005)

    def _files(self):
        """Folders of checkpoints, whole or begun."""
        return [path.name for path in (self.run_dir / "checkpoints").glob("*iter_*")]

    def _phase(self, named, trained):
        """Where the kill hit, from what it left on disk."""
        newest = max((int(name.split("_")[1].split(".")[0]) for name in self._files()), default=0)
        if newest > (self.tracker() or 0):
            return "save"
        return "train" if trained > (named or 0) else "start"

    def _trained(self):
        metrics = self.run_dir / "metrics.jsonl"
        numbers = re.findall(r'^\{"iteration": (\d+)', metrics.read_text() if metrics.exists() else "", re.M)
        return int(numbers[-1]) if numbers else 0

    def tracker(self):
        """The iteration that a resume goes on from; None if there is none."""
        path = self.run_dir / "checkpoints/latest_checkpointed_iteration.txt"
        return int(path.read_text()) if path.exists() else None


def differences(result, expected):
    """What differs between two runs, but for what a clock has measured."""
    parts = {
        "metrics": [[_plain(record) for record in run["metrics"]] for run in (result, expected)],
        "mixing": [[_plain(record) for record in run["mixing"]] for run in (result, expected)],
        "blend": [run["blend"] for run in (result, expected)],
        "routers": [
            {name: value.tobytes() for name, value in run["routers"].items()} for run in (result, expected)
        ],
    }
    return [name for name, (one, other) in parts.items() if one != other]


def _plain(record):
    return {name: value for name, value in record.items() if name not in CLOCKS}


def main():
    """Print what became of a run that was killed so many times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    verdict = "equal to the undisturbed run, bit for bit"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run_yaml = make_quickstart(root / "data")
        for name, extra in [("saving", []), ("saving asynchronously", ["--async-save"])]:
            flags = settings(2 * arguments.kills, *extra)  # four an attempt
            expected, seconds = undisturbed(run_yaml, flags, root / f"{name} undisturbed")
            span = min(seconds, 12.0)
            kills = arguments.kills // 2
            killer = Killer(
                *(run_yaml, flags, root / name),
                kills=kills,
                span=span,
                seed=arguments.seed,
                overlaps=kills // 2,
            )
            result = killer.finish()
            wrong = differences(result, expected)
            if wrong:
                verdict = f"DIFFERENT in {', '.join(wrong)}"
            print(
                f"{name}: {sum(killer.phases.values())} kills "
                f"({', '.join(f'{number} in {phase}' for phase, number in sorted(killer.phases.items()))}), "
                f"{killer.resumed} resumes that trained on, {killer.lost} iterations trained again, "
                f"{dict(killer.second_starts)} of those that came while the run was there; "
                f"{verdict}",
                flush=True,
            )
    return "DIFFERENT" in verdict


if __name__ == "__main__":
    sys.exit(main())
