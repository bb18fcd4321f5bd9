"""Every benchmark runs at its smallest size; what it measures there means nothing."""

import contextlib
import os
import re
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.distributed.conftest import quick_or_slow
from tests.distributed.ranks import run_ranks

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALLEST = {
    "blend_rebuild.py": "--sources 3 --interval-rows 64 --source-rows 50 --consumed 640 --pairs 1 "
    "--stock-builds 1",
    "convert.py": "--gigabytes 0.002 --shard-gigabytes 0.001 --rounds 1",
    "counting.py": "--seq-lengths 128 --pairs 1 --warmup 1",
    "log_cost.py": "--iterations 2",
    "overhead.py": "--pairs 1 --warmup 1 --repetitions 1 --probe-tokens 256 --save-interval 100",
    "packing.py": "--seq-length 256 --batch-size 4 --shuffles 2 --examples 2000",
    "prepare.py": "--megabytes 0.02 --workers 1 --repeats 1",
    "report.py": "--updates 3 --sources 3 --experts 4 --repeats 1",
    "stick_breaking.py": "--seq-length 64 --width 16 --rounds 1",
    "stock.py": "--iterations 8",
    "update.py": "--sources 4 --layers 2 --experts 8 --tokens 1000 --updates 2",
}
QUICK = {"blend_rebuild.py", "stick_breaking.py", "update.py"}
"""The others start processes of their own, each of which loads torch, or measure for some seconds."""


def run_script(path, arguments):
    """What a script and its processes print; torch and Megatron-Core are loaded here already."""
    sys.argv = [str(path), *arguments]
    with tempfile.TemporaryFile("w+") as said:
        os.dup2(said.fileno(), 1)
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(path), run_name="__main__")
        said.seek(0)
        return said.read()


def test_every_benchmark_is_here():
    assert {path.name for path in FOLDER.glob("*.py")} == SMALLEST.keys()


@pytest.mark.parametrize("name", quick_or_slow(SMALLEST, QUICK))
def test_a_benchmark_prints_its_table(name):
    if name == "report.py" and not (
        os.environ.get("DYNMIX_CHROMIUM") or shutil.which("chromium-headless-shell")
    ):
        pytest.skip("there is no Chromium")
    (said,) = run_ranks(1, run_script, FOLDER / name, SMALLEST[name].split())
    if said.startswith("skipped: "):
        pytest.skip(said.removeprefix("skipped: ").strip())
    assert re.search(r"\d\.\d", said), said


@pytest.mark.parametrize("path", FOLDER.glob("*.py"), ids=lambda path: path.name)
def test_benchmarks_use_public_names_of_the_package(path):
    assert not re.findall(r"(?<!self)\.(_[a-z]\w+)", path.read_text())
