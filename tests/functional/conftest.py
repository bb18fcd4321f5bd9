"""A folder like a fresh clone after its installation, and the quickstart run in it, made once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import preloaded
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
def served(clone, tmp_path_factory):
    """A console script like the installed one; its commands are forks of a process that has loaded all."""
    folder = tmp_path_factory.mktemp("served")
    address, script = folder / "socket", folder / "megatron-dynmix"
    python = str(clone / ".venv/bin/python")
    script.write_text(preloaded.CLIENT.format(python=python, address=str(address)))
    script.chmod(0o755)
    command = [python, "-W", "ignore", preloaded.__file__, str(address)]
    server = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not address.exists():
        assert server.poll() is None and time.monotonic() < deadline, "the preloaded process did not start"
        time.sleep(0.1)
    yield script
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.fixture(scope="session")
def quickstart(clone, terminal):
    """`make quickstart` as it was done."""
    return subprocess.run(
        ["make", "quickstart"], cwd=clone, env=terminal, capture_output=True, text=True, timeout=280
    )
