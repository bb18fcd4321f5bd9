"""What only a GPU can show, in eight minutes on one of them and without a network.

Prints one JSON line for each part and a last one with the verdict, and writes them to lines.jsonl of the
output folder; what the parts print themselves is in its log.txt. Exit code 1 if any part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.gpu_check.supervise import Job, Line, Part, lines_of

DEFAULT = Path("build/gpu-check")
SECONDS = 480
IN_ONE_PROCESS = (
    [
        Part("tools.gpu_check.machine:device", 30),
        Part("tools.gpu_check.small:losses_fp32", 60),
        Part("tools.gpu_check.small:losses_bf16", 60),
        Part("tools.gpu_check.small:counts", 20),
        Part("tools.gpu_check.small:resume", 90),
        Part("tools.gpu_check.small:seeds", 20),
        Part("tools.gpu_check.small:waits", 60),
        Part("tools.gpu_check.small:attention_fp32", 20),
        Part("tools.gpu_check.small:attention_bf16", 20),
    ],
    [
        Part("tools.gpu_check.large:beside_bare_loop", 150),
        Part("tools.gpu_check.large:peak_memory", 90),
        Part("tools.gpu_check.large:idle", 60),
        Part("tools.gpu_check.large:counting", 60),
        Part("tools.gpu_check.large:probe", 60),
    ],
    [Part("tools.gpu_check.machine:tests", 120)],
)
"""Parts that share a process, and with it what the first of them has built."""


def install(carried: Path, site: Path) -> Line:
    """Install the carried wheels into a folder of their own, in front of all other packages."""
    start, wheels = time.monotonic(), sorted(carried.glob("*.whl"))
    line: Line = {"part": "install", "ok": True, "seconds": 0.0, "wheels": len(wheels)}
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run(
            [*pip, "--target", str(site), *map(str, wheels)], capture_output=True, text=True
        )
        line["ok"] = done.returncode == 0
        if not line["ok"]:
            line["error"] = done.stderr.strip()[-1000:]
    paths = [str(site), os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.path.insert(0, str(site))
    line["seconds"] = round(time.monotonic() - start, 2)
    return line


def check(groups: Sequence[Sequence[Part]], job: Job, log: Path, seconds: float) -> Iterator[Line]:
    """Yield the line of each part, and last the verdict."""
    start = time.monotonic()
    failed, passed = [], 0
    first = install(job.carried, job.scratch / "site")
    for lines in ([first], *(lines_of(parts, job, log, start + seconds) for parts in groups)):
        for line in lines:
            yield line
            passed += line["ok"]
            if not line["ok"]:
                failed.append(line["part"])
    verdict = {"passed": passed, "failed": failed, "tiny": job.tiny}
    yield {"part": "verdict", "ok": not failed, "seconds": round(time.monotonic() - start, 2), **verdict}


def chosen(names: Sequence[str], seconds: float = SECONDS) -> list[list[Part]]:
    """Return the parts of these names, or all; each gets its share of the seconds."""
    return [
        [
            Part(part.function, part.seconds * seconds / SECONDS)
            for part in parts
            if not names or part.name in names
        ]
        for parts in IN_ONE_PROCESS
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help="names of the parts to run; all if none is given")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", DEFAULT)), metavar="DIR")
    parser.add_argument("--carried", type=Path, default=Path("build/gpu-wheels"), metavar="DIR")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="that all parts have together (%(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="at a size for a CPU, to try the parts out")
    given = parser.parse_args(arguments)
    known = [part.name for parts in IN_ONE_PROCESS for part in parts]
    if unknown := [name for name in given.parts if name not in known]:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(known)}")
    groups = chosen(given.parts, given.seconds)
    given.output.mkdir(parents=True, exist_ok=True)
    log = given.output / "log.txt"
    log.unlink(missing_ok=True)
    line: Line = {}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        (given.output / "lines.jsonl").open("w", encoding="utf-8") as file,
    ):
        carried = given.carried.resolve()
        job = Job(data=carried / "data", scratch=Path(scratch), carried=carried, tiny=given.tiny)
        for line in check(groups, job, log, given.seconds):
            text = json.dumps(line)
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()
    return 0 if line["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
