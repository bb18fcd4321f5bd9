"""What becomes of a process whose output goes nowhere: one that makes files goes on, others end quietly."""

import errno
import os
import subprocess
import sys

import pytest

from megatron_dynmix.files import FULL
from megatron_dynmix.job.streams import _Stream

PROGRAM = """
import contextlib, os, sys
from megatron_dynmix.job.streams import secure_output
secure_output(goes_on=True)
with open("made", "w") as made:
    sys.stdin and sys.stdin.readline()
    for number in range(3):
        print("line", number, flush=True)
        print("to stderr", number, file=sys.stderr)
        with contextlib.suppress(OSError):
            os.write(1, b"from C")
        made.write(f"{number} ")
        made.flush()
    print("never flushed")
"""


def in_shell(command, folder, **options):
    """What a shell does with a pipe, and the exit code of the first process of it."""
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        **options,
    )


def go_on(tmp_path, redirection):
    """Exit code and stderr of a process that a shell starts, and what it made."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = f"{sys.executable} {program} {redirection}"
    done = in_shell(command, tmp_path, input="\n")
    return done.returncode, done.stdout, done.stderr, (tmp_path / "made").read_text()


LOST = "megatron-dynmix: standard output cannot be written (%s); the work goes on"


@pytest.mark.parametrize(
    ("redirection", "out", "said"),
    [
        ("", "line 0\nfrom Cline 1\nfrom Cline 2\nfrom Cnever flushed\n", ""),
        ("| sleep 0", "", LOST % os.strerror(errno.EPIPE)),
        ("| head -1", "line 0\n", None),
        (">/dev/full", "", LOST % os.strerror(errno.ENOSPC)),
        (">&-", "", ""),
        ("2>&-", "line 0\nfrom Cline 1\nfrom Cline 2\nfrom Cnever flushed\n", None),
        (">&- 2>&-", "", None),
        (">&- 2>&- <&-", "", None),
        (">/dev/full 2>&1", "", None),
        ("2>&1 | sleep 0", "", None),
    ],
)
def test_the_work_goes_on_and_is_done_well(tmp_path, redirection, out, said):
    code, printed, errors, made = go_on(tmp_path, redirection)
    assert (code, made) == (0, "0 1 2 "), errors
    assert printed == out
    if said is not None:
        lost = [line for line in errors.splitlines() if "to stderr" not in line]
        assert len(lost) == bool(said) and all(line.startswith(said) for line in lost)
    assert "Exception" not in errors


def test_a_disk_that_has_room_again_is_written_again(monkeypatch, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        stream, write = _Stream(log.fileno(), goes_on=True), os.write
        stream.write(b"one ")
        for number in FULL:
            monkeypatch.setattr(os, "write", lambda *_, number=number: raise_(OSError(number, "full")))
            assert stream.write(b"lost ") == 5
        monkeypatch.setattr(os, "write", write)
        stream.write(b"two")
    assert (tmp_path / "log").read_text() == "one two"


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("| sleep 0", 141, ""),
        (">/dev/full", 1, "megatron-dynmix: standard output cannot be written (No space left on device)\n"),
        (">&-", 0, ""),
    ],
)
def test_a_command_that_only_prints_ends_quietly(tmp_path, redirection, code, said):
    (tmp_path / "load.json").write_text('{"a": [1, 2, 3, 4], "b": [4, 3, 2, 1], "c": [1, 1, 1, 1]}')
    command = f"(sleep 0.3; {sys.executable} -m megatron_dynmix update --load load.json) {redirection}"
    done = in_shell(command, tmp_path)
    assert (done.returncode, done.stderr) == (code, said)
