"""What is used up is named, whoever says so and in whatever words."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from megatron_dynmix import files
from megatron_dynmix.job.resources import exhausted

CASES = [
    (OSError(errno.EMFILE, "Too many open files", "x"), "no more files can be opened: this process may have"),
    (OSError(errno.ENFILE, "Too many open files in system"), "no more files can be opened"),
    (RuntimeError("[../gloo/transport/tcp/device.cc:83] socket: Too many open files"), "ulimit -n"),
    (
        RuntimeError(
            "unable to open shared memory object </torch_7> in read-write mode: Too many open files (24)"
        ),
        "ulimit -n",
    ),
    (ImportError("libx.so: cannot open shared object file: Too many open files"), "ulimit -n"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more processes or threads"),
    (RuntimeError("can't start new thread"), "ulimit -u"),
    (RuntimeError("std::system_error: Resource temporarily unavailable"), "ulimit -u"),
    (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error."), "shared memory is used up"),
    (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "--shm-size"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Success (0)"), "/dev/shm"),
    (OSError(errno.ENOSPC, "No space left on device", "/dev/shm/sem.x"), "shared memory"),
    (OSError(errno.ENOSPC, "No space left on device", "/tmp"), "no room is left on the disk of /tmp"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "a quota: quota -s"),
    (RuntimeError("[enforce fail] . unexpected pos 64 vs 0: No space left on device"), "no room is left"),
    (MemoryError(), "memory is used up"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory is used up"),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried"
        ),
        "memory is used up",
    ),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "ulimit -v"),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory is used up"),
    (RuntimeError("std::bad_alloc"), "memory is used up"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the memory of the GPU is used up"),
]
OTHERS = [
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/dev/shm/torch_1"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:538] Read error: Resource temporarily unavailable"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ValueError("memory"),
    ZeroDivisionError("division by zero"),
]


@pytest.mark.parametrize(("error", "said"), CASES, ids=lambda value: str(value)[:40])
def test_what_is_used_up_is_named_with_the_remedy(error, said):
    found = exhausted(error)
    assert found is not None and said in found
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("rank 1 failed") from cause
    except RuntimeError as outer:
        assert said in exhausted(outer)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_what_is_not_used_up_is_not_named(error):
    assert exhausted(error) is None


def test_a_disk_without_inodes_is_not_called_full(monkeypatch, tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "a/b"))
    assert "no room is left" in exhausted(error) and not files.inodes_are_used_up(tmp_path / "a/b")
    stats = os.statvfs(tmp_path)
    none = os.statvfs_result((*stats[:5], 1000, 0, 0, *stats[8:]))
    monkeypatch.setattr(os, "statvfs", lambda _: none)
    assert f"no inode is left on the disk of {tmp_path}/a/b (df -i)" in exhausted(error)
    assert "no inode is left, see df -i" in files.why_not_written(error, tmp_path)


PROGRAM = """
import sys
from megatron_dynmix import cli
import megatron_dynmix.commands.update as update
def run(*_):
    {what}
update.run = run
sys.exit(cli.main(["update"]))
"""


@pytest.mark.parametrize(
    ("limit", "value", "what", "said"),
    [
        (resource.RLIMIT_NOFILE, 20, "kept = [open('/dev/null') for _ in range(99)]", "20 open"),
        (resource.RLIMIT_AS, 2**30, "bytearray(2**31)", "a process of 1.0 GiB (ulimit -v)"),
    ],
)
def test_a_limit_ends_a_command_with_one_line(limit, value, what, said):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(what=what)],
        preexec_fn=lambda: resource.setrlimit(limit, (value, value)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("megatron-dynmix: ") and said in done.stderr
