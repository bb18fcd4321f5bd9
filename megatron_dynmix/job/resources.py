"""What of a machine is used up when something fails: torch, gloo and the system say it in their own words."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from megatron_dynmix.files import FULL, inodes_are_used_up

OPEN_FILES = "Too many open files"  # EMFILE, ENFILE
THREADS = r"can't start new thread|Resource temporarily unavailable|pthread_create"  # EAGAIN
SHARED_MEMORY = r"shared memory|/dev/shm|</?torch_\d|Bus error"
DISK = r"No space left on device|Disk quota exceeded|disk is full"
DEVICE_MEMORY = r"CUDA out of memory|HIP out of memory"
MEMORY = (
    r"Cannot allocate memory|can't allocate memory|not enough memory|std::bad_alloc|failed to map segment|"
    r"out of memory"
)


def exhausted(error: BaseException) -> str | None:
    """Return which resource an error, or one that led to it, says is used up, and the remedy; else None."""
    for one in _chain(error):
        if found := _named(one):
            return f"{found} ({_short(error)})"
    return None


def _named(error: BaseException) -> str | None:
    """Look at the words, for only the system's own errors carry numbers; the more special case first."""
    text = f"{type(error).__name__}: {error}"

    def says(pattern: str, *numbers: int) -> bool:
        return getattr(error, "errno", None) in numbers or re.search(pattern, text) is not None

    if says(OPEN_FILES, errno.EMFILE, errno.ENFILE):
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"no more files can be opened: this process may have {files} open. Raise that: ulimit -n 65536 "
            "(Docker: --ulimit nofile=65536; systemd: LimitNOFILE=65536)"
        )
    # a socket without data is "temporarily unavailable" too
    if says(THREADS) and "/gloo/" not in text and not isinstance(error, ConnectionError):
        number = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        limit = f"this user may have {number}" if number != resource.RLIM_INFINITY else "see the container's"
        return (
            f"no more processes or threads can be started: {limit}. Raise that: ulimit -u (Docker: "
            "--pids-limit; Slurm and Kubernetes: pids.max of the cgroup), or start fewer: --num-workers, "
            "OMP_NUM_THREADS=1"
        )
    if says(SHARED_MEMORY) and not isinstance(error, FileNotFoundError):
        return (
            "shared memory is used up (df -h /dev/shm): give more (Docker: --shm-size=8g, or --ipc=host), or "
            "--num-workers 0"
        )
    if says(DISK, *FULL):
        name = getattr(error, "filename", None)
        place = f" on the disk of {name}" if isinstance(name, str | Path) else ""
        if name and inodes_are_used_up(Path(os.fsdecode(name))):
            return f"no inode is left{place} (df -i): remove files, however small"
        return f"no room is left{place} (df -h; a quota: quota -s): make room"
    if says(DEVICE_MEMORY):
        return (
            "the memory of the GPU is used up: a smaller --micro-batch-size or --seq-length, recomputation "
            "(--recompute-granularity full) or more ranks need less; `megatron-dynmix plan` tells how much"
        )
    if isinstance(error, MemoryError) or says(MEMORY, errno.ENOMEM):
        size = resource.getrlimit(resource.RLIMIT_AS)[0]
        given = "" if size == resource.RLIM_INFINITY else f" of {size / 2**30:.1f} GiB"
        return (
            "memory is used up: see free -g, the container's limit, and that of a process"
            f"{given} (ulimit -v). Raise it, or have fewer ranks and --num-workers on this host, a smaller "
            "--micro-batch-size or model"
        )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0]:.200}" if lines else type(error).__name__
