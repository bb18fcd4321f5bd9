"""Where this rank stands in its job and where the ranks meet: the variables of `torchrun` or `srun`, checked.

RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
"""

from __future__ import annotations

import os
import socket

from megatron_dynmix.errors import InputError

LAST_PORT = 65535
MOST_DIGITS = 9
STARTED = "torchrun or srun set it; without them start the ranks of this machine with --nproc-per-node N"


def join_srun() -> None:
    """Take this task's rank from `srun`, which names it in variables of its own."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" in os.environ or tasks == "1" or "SLURM_PROCID" not in os.environ:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"this is one of {tasks} tasks of srun, but {' and '.join(missing)} are not set; export the "
            "address of the first node and a free port, or start one rank here with --nproc-per-node 1"
        )
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=tasks, LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0")
    )


def is_rank() -> bool:
    """Whether this process is a rank of a started job."""
    return "RANK" in os.environ


def world_size_for(nproc: int | None) -> int:
    """Return the ranks of a command: as many as it is to start here, or those of the job that it is in.

    `InputError`: it is a rank of a started job and is to start others, or fewer than one.
    """
    if nproc is not None and is_rank():
        raise InputError(
            f"--nproc-per-node {nproc} is given, but this is a rank of a started job; leave it out"
        )
    if nproc is not None and nproc < 1:
        raise InputError(f"--nproc-per-node is {nproc}; it must be 1 or more")
    return nproc or world_size_of_job()


def world_size_of_job() -> int:
    """Return the number of ranks of the job that this process is a rank of; 1 if it is of none.

    `InputError`: a value is missing, is no number, or does not go with the others, or the meeting place is
    none. Waiting for the other ranks would tell as much in minutes.
    """
    if not is_rank():
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but RANK is not set; {STARTED}")
        return 1
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    if world_size < 1:
        raise InputError("WORLD_SIZE is 0; it is the number of ranks, 1 or more")
    local_size = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else world_size
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
    if not 1 <= local_size <= world_size:
        raise InputError(
            f"LOCAL_WORLD_SIZE is {local_size}, but WORLD_SIZE is {world_size}; a host has from 1 to all of "
            "the ranks"
        )
    local = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "WORLD_SIZE"
    for name, value, of, size in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, local, local_size),
    ):
        if value >= size:
            raise InputError(f"{name} is {value}, but {of} is {size}; ranks are counted from 0 to {size - 1}")
    _check_meeting_place()
    return world_size


def _check_meeting_place() -> None:
    port = _number("MASTER_PORT")
    if not 1 <= port <= LAST_PORT:
        raise InputError(f"MASTER_PORT is {port}; give a free port of rank 0's host, from 1 to {LAST_PORT}")
    address = os.environ.get("MASTER_ADDR", "").strip()
    wanted = "give the name or the address of rank 0's host"
    if not address:
        raise InputError(f"MASTER_ADDR is not set, or empty; {wanted}")
    if address.startswith("[") or "/" in address:
        raise InputError(f"MASTER_ADDR is {address!r}; {wanted} alone, as ::1, without brackets or a scheme")
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"MASTER_ADDR is {address!r}, which {socket.gethostname()} cannot find ({error}); {wanted}"
        ) from None


def _number(name: str) -> int:
    text = os.environ.get(name)
    if text is None:
        raise InputError(f"RANK is {os.environ['RANK']!r}, but {name} is not set; {STARTED}")
    if not text.isascii() or not text.isdigit() or len(text) > MOST_DIGITS:
        raise InputError(f"{name} is {text[:40]!r}; it must be a whole number, 0 or more")
    return int(text)
