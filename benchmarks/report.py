"""What `report` takes of a long run: the time to make the page, and to open it in Chromium.

The run directory is made up: 2,000 updates of 64 sources and 64 experts, some 300 MB of records. The page is
made by the command in a process of its own, its start included. Opened is until the page is loaded and its
first chart stands, and until all do; beside it stands an empty page with the same library, which nothing
that we do can undercut. CPU time (of all of Chromium's processes) is given too: other programs on the
machine disturb it less. Needs `chromium-headless-shell` (or `DYNMIX_CHROMIUM`) and playwright, of the `dev`
extra.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from playwright.sync_api import Browser, sync_playwright
from plotly.offline import get_plotlyjs

from megatron_dynmix.records.text_table import table

sys.path.append(str(Path(__file__).parents[1] / "tests/unit"))

from report_fixtures import write_run

MAKE_SECONDS, OPEN_SECONDS = 10.0, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--sources", type=int, default=64)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = tuple(f"source_{number:02}" for number in range(arguments.sources))
        run_dir = write_run(
            Path(folder) / "run", updates=arguments.updates, sources=names, experts=arguments.experts
        )
        records = (run_dir / "mixing.jsonl").stat().st_size / 1e6
        made = [make(run_dir) for _ in range(arguments.repeats)]
        page = run_dir / "report.html"
        bare = Path(folder) / "bare.html"
        bare.write_text(f"<!doctype html><meta charset=utf-8><script>{get_plotlyjs()}</script>")
        rows = [["make the page", *spread(made), f"{MAKE_SECONDS:.0f}"]]
        rows += opened(page, bare, arguments.repeats)
        print(f"{arguments.updates} updates, {arguments.sources} sources, {arguments.experts} experts")
        print(f"{records:.0f} MB of updates, a page of {page.stat().st_size / 1e6:.1f} MB")
        print(table(["seconds", "wall", "fastest", "slowest", "CPU", "target"], rows))


Times = tuple[float, float]
"""Wall and CPU seconds."""


def make(run_dir: Path) -> Times:
    """Return the seconds of one command."""
    start, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-m", "megatron_dynmix", "report", str(run_dir)], check=True, capture_output=True
    )
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def opened(page: Path, bare: Path, repeats: int) -> list[list[str]]:
    """Return rows of the table: the page until its first chart stands, until all do, and the bare one."""
    program = os.environ.get("DYNMIX_CHROMIUM") or shutil.which("chromium-headless-shell")
    if program is None:
        raise SystemExit("there is no chromium-headless-shell: apt-get install it, or set DYNMIX_CHROMIUM")
    first, whole, empty = [], [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        open_once(browser, bare, "html")  # the first page of a browser waits for its processes
        for _ in range(repeats):
            empty.append(open_once(browser, bare, "html")[0])
            loaded, drawn = open_once(browser, page, "html[data-ready]")
            first.append(loaded)
            whole.append(drawn)
        browser.close()
    return [
        ["open it: first chart drawn", *spread(first), f"{OPEN_SECONDS:.0f}"],
        ["open it: all charts drawn", *spread(whole), ""],
        ["open a page with the library alone", *spread(empty), ""],
    ]


def open_once(browser: Browser, path: Path, ready: str) -> tuple[Times, Times]:
    """Return the times until the page is loaded, its first chart drawn, and until `ready` is in it."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    start, before = time.perf_counter(), browser_seconds()
    page.goto(path.as_uri())
    loaded = time.perf_counter() - start, browser_seconds() - before
    page.wait_for_selector(ready, state="attached")
    drawn = time.perf_counter() - start, browser_seconds() - before
    page.close()
    return loaded, drawn


def browser_seconds() -> float:
    """Return the CPU seconds so far of all processes below this one."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def spread(times: list[Times]) -> list[str]:
    """Return wall seconds, median, fastest and slowest, and CPU seconds, median."""
    wall, cpu = zip(*times, strict=True)
    values = (statistics.median(wall), min(wall), max(wall), statistics.median(cpu))
    return [f"{value:.2f}" for value in values]


if __name__ == "__main__":
    main()
