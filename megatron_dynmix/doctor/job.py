"""Checks of what a job is told: ranks, the place to meet, time-outs; and of what a process may use."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_dynmix.doctor.finding import Finding, good, problem, warning
from megatron_dynmix.doctor.machine import UNLIMITED, Machine

GIB = 2**30
TOGETHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BELOW = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
SAME = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"))
"""Of one job that `srun` started: a rank of `torchrun` has a number of its own."""
OLD_NAMES = ("NCCL_ASYNC_ERROR_HANDLING", "NCCL_BLOCKING_WAIT", "NCCL_DESYNC_DEBUG")
OFF = ("0", "false", "no")
INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
FILES = 4096
SHARED_MEMORY = GIB


def check_job(machine: Machine) -> list[Finding]:
    """Every check of this file, in the order of the table."""
    return [
        ranks(machine),
        meeting_place(machine),
        interfaces(machine),
        time_outs(machine),
        open_files(machine),
        shared_memory(machine),
        address_space(machine),
    ]


def ranks(machine: Machine) -> Finding:
    """Whether the variables of torchrun and Slurm agree with one another and with the GPUs."""
    name, given = "ranks", machine.environment
    numbers = _numbers(given)
    if isinstance(numbers, Finding):
        return numbers
    in_job = [variable for variable in TOGETHER if variable in given]
    missing = [variable for variable in TOGETHER if variable not in given]
    if "RANK" in in_job and missing:
        remedy = "start ranks with torchrun or srun, which set all four, or unset RANK"
        return problem(name, f"{', '.join(in_job)} set, but not {', '.join(missing)}", remedy)
    for rank, size in BELOW:
        if rank in numbers and size in numbers and not 0 <= numbers[rank] < numbers[size]:
            found = f"{rank} is {numbers[rank]}, but {size} is {numbers[size]}"
            return problem(name, found, "unset both: they are left over from another job, or copied wrongly")
    if "TORCHELASTIC_RUN_ID" not in given:
        for ours, slurms in SAME:
            if ours in numbers and slurms in numbers and numbers[ours] != numbers[slurms]:
                found = f"{ours} is {numbers[ours]}, but {slurms} is {numbers[slurms]}"
                return problem(name, found, f"unset {ours}: `train` takes it from Slurm")
    local = numbers.get("LOCAL_WORLD_SIZE", 1)
    if machine.gpus and local > len(machine.gpus):
        found = f"{local} ranks on this node, but {len(machine.gpus)} GPUs"
        return problem(name, found, "start as many ranks as there are GPUs (--nproc-per-node)")
    if "RANK" not in given:
        return good(name, "not in a job")
    return good(name, f"rank {given['RANK']} of {given['WORLD_SIZE']}")


def _numbers(given: Mapping[str, str]) -> dict[str, int] | Finding:
    found = {}
    for variable in {name for pair in (*BELOW, *SAME) for name in pair} & given.keys():
        if not given[variable].isdigit():
            return problem("ranks", f"{variable} is {given[variable]!r}", f"set {variable} to a whole number")
        found[variable] = int(given[variable])
    return found


def meeting_place(machine: Machine) -> Finding:
    """Whether ranks can find MASTER_ADDR, and listen on MASTER_PORT."""
    name, given = "meeting place", machine.environment
    address, port = given.get("MASTER_ADDR"), given.get("MASTER_PORT")
    if address is not None and machine.addresses.get(address) is None:
        remedy = "give the first node's name as the others know it (scontrol show hostnames), or its address"
        return problem(name, f"MASTER_ADDR is {address}, which has no address here", remedy)
    if port is not None and not (port.isdigit() and 0 < int(port) < 65536):
        return problem(name, f"MASTER_PORT is {port!r}", "give a number from 1 to 65535")
    if machine.port_is_free is False:
        remedy = "choose another MASTER_PORT, or end what is left of the last job"
        return problem(name, f"MASTER_PORT {port} is in use on this machine", remedy)
    if machine.addresses.get(machine.hostname) is None:
        return warning(
            name,
            f"this machine's own name, {machine.hostname}, has no address",
            f"add a line '127.0.1.1 {machine.hostname}' to /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    return good(name, f"{address}:{port}" if address else f"{machine.hostname} is known by name")


def interfaces(machine: Machine) -> Finding:
    """Whether the network interfaces that NCCL and gloo are told to use are there."""
    for variable in INTERFACES:
        wanted = machine.environment.get(variable)
        if wanted is None or wanted.startswith("^"):
            continue
        exact = wanted.startswith("=") or variable.startswith("GLOO")
        names = wanted.lstrip("=").split(",")
        missing = [
            one
            for one in names
            if not any(each == one if exact else each.startswith(one) for each in machine.interfaces)
        ]
        if missing:
            found = f"{variable} is {wanted}, but there is no {', '.join(missing)}"
            return problem("interfaces", found, f"use one of {', '.join(machine.interfaces)}, or unset it")
    return good("interfaces", ", ".join(machine.interfaces))


def time_outs(machine: Machine) -> Finding:
    """Whether a rank that hangs can be noticed."""
    name, given = "time-outs", machine.environment
    if given.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "").lower() in OFF:
        return problem(
            name,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING is off: a job whose rank is lost hangs until it is cancelled",
            "unset TORCH_NCCL_ASYNC_ERROR_HANDLING",
        )
    old = [variable for variable in OLD_NAMES if variable in given]
    if old:
        remedy = f"set {', '.join(f'TORCH_{variable}' for variable in old)} instead, or nothing"
        return warning(name, f"{', '.join(old)} set, which torch no longer goes by", remedy)
    if given.get("CUDA_LAUNCH_BLOCKING") == "1":
        return warning(name, "CUDA_LAUNCH_BLOCKING is 1: every kernel is waited for", "unset it to train")
    return good(name, "as torch has them; collectives wait distributed_timeout_minutes")


def open_files(machine: Machine) -> Finding:
    """Sources, workers, sockets and shards are all open files."""
    if machine.open_files != UNLIMITED and machine.open_files < FILES:
        found = f"{machine.open_files} may be open in a process"
        return warning("open files", found, "ulimit -n 65536 (Docker: --ulimit nofile=65536)")
    return good("open files", "unlimited" if machine.open_files == UNLIMITED else str(machine.open_files))


def shared_memory(machine: Machine) -> Finding:
    """Data workers and NCCL hand tensors over in /dev/shm."""
    found = f"{machine.shared_memory / GIB:.1f} GiB in /dev/shm"
    if machine.shared_memory < SHARED_MEMORY:
        remedy = "in a container: --ipc=host or --shm-size=16g (Kubernetes: an emptyDir with medium Memory)"
        return warning("shared memory", found, remedy)
    return good("shared memory", found)


def address_space(machine: Machine) -> Finding:
    """Memory-mapped sources and CUDA take far more addresses than memory."""
    found = f"{machine.memory / GIB:.0f} GiB of memory"
    if machine.address_space != UNLIMITED:
        limit = f"{found}, and a limit of {machine.address_space / GIB:.0f} GiB on addresses"
        return warning("memory", limit, "ulimit -v unlimited: it counts what is only mapped")
    return good("memory", found)
