"""A folder like a fresh clone after its installation, and the quickstart run in it, made once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def terminal():
    """The environment of a new terminal."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """The repository's files, and a `.venv` with this interpreter's packages."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "setup.py", "constraints.txt", "examples", "tools", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    bin_folder = folder / ".venv/bin"
    bin_folder.mkdir(parents=True)
    for path in Path(sys.prefix).iterdir():
        if path.name not in ("bin", ".installed"):
            (folder / ".venv" / path.name).symlink_to(path)
    for path in Path(sys.prefix, "bin").iterdir():
        if path.name != "activate":
            (bin_folder / path.name).symlink_to(path)
    (bin_folder / "activate").write_text(f'export PATH="{bin_folder}:$PATH"\n')
    (folder / ".venv/.installed").touch()  # newer than setup.py and constraints.txt: make installs nothing
    return folder


@pytest.fixture(scope="session")
def quickstart(clone, terminal):
    """`make quickstart` as it was done."""
    return subprocess.run(
        ["make", "quickstart"], cwd=clone, env=terminal, capture_output=True, text=True, timeout=280
    )
