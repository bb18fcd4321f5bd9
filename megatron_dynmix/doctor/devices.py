"""Checks of GPUs, their driver and their network."""

from __future__ import annotations

from packaging.version import Version

from megatron_dynmix.doctor.finding import Finding, good, problem, warning
from megatron_dynmix.doctor.machine import UNLIMITED, Machine

GIB = 2**30
BUSY_SHARE = 0.9
"""Of a GPU's memory; with less of it free another process is using the GPU."""


def check_devices(machine: Machine) -> list[Finding]:
    """Every check of this file, in the order of the table."""
    return [cuda(machine), gpus(machine), backends(machine), infiniband(machine)]


def cuda(machine: Machine) -> Finding:
    """Whether torch's CUDA and the driver's go together."""
    name = "CUDA"
    if machine.torch_cuda is None:
        if machine.driver is None:
            return good(name, "none: runs on the CPU, over gloo")
        return problem(
            name,
            f"there is a driver ({machine.driver}), but this torch is built for CPUs",
            "install a CUDA build of torch (pytorch.org/get-started), then what is compiled against it",
        )
    if machine.cuda_available:
        return good(name, f"torch's {machine.torch_cuda}, the driver's {machine.driver_cuda or 'unknown'}")
    if machine.driver is None and machine.driver_cuda is None:
        return good(name, f"no driver, so torch's CUDA {machine.torch_cuda} is not used: runs on the CPU")
    if machine.driver_cuda and _major(machine.driver_cuda) < _major(machine.torch_cuda):
        return problem(
            name,
            f"torch is built for CUDA {machine.torch_cuda}, the driver ({machine.driver}) has "
            f"{machine.driver_cuda}",
            f"a newer driver, or a torch that is built for CUDA {_major(machine.driver_cuda)}",
        )
    return problem(
        name,
        f"torch cannot use the GPUs: {machine.cuda_error or 'no device is visible'}",
        "look at nvidia-smi and CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all",
    )


def _major(version: str) -> int:
    return Version(version).release[0]


def gpus(machine: Machine) -> Finding:
    """How many there are, that they are alike, and that nobody else is using them."""
    name = "GPUs"
    if not machine.gpus:
        return good(name, "none")
    kinds = sorted({gpu.name for gpu in machine.gpus})
    memory = min(gpu.memory for gpu in machine.gpus) / GIB
    found = f"{len(machine.gpus)} x {' and '.join(kinds)}, {memory:.0f} GiB"
    if len(kinds) > 1:
        return warning(name, found, "the slowest decides; choose with CUDA_VISIBLE_DEVICES")
    busy = [str(index) for index, gpu in enumerate(machine.gpus) if gpu.free < BUSY_SHARE * gpu.memory]
    if busy:
        least = min(gpu.free for gpu in machine.gpus) / GIB
        return warning(
            name,
            f"{found}; other processes use number {', '.join(busy)}: {least:.0f} GiB are free",
            "nvidia-smi shows them; end them, or choose others with CUDA_VISIBLE_DEVICES",
        )
    return good(name, found)


def backends(machine: Machine) -> Finding:
    """Gloo always, NCCL beside it on GPUs."""
    name = "NCCL, gloo"
    if not machine.gloo:
        return problem(name, "this torch has no gloo", "install an official build of torch")
    if not machine.cuda_available:
        return good(name, "gloo")
    if machine.nccl is None:
        return problem(name, "this torch has no NCCL", "install an official CUDA build of torch")
    return good(name, f"NCCL {machine.nccl}, gloo")


def infiniband(machine: Machine) -> Finding:
    """Whether NCCL can use the adapters that are there."""
    name = "InfiniBand"
    if not machine.infiniband:
        return good(name, "none: several nodes would talk over Ethernet")
    found = ", ".join(machine.infiniband)
    if machine.environment.get("NCCL_IB_DISABLE") == "1":
        return warning(name, f"{found}, but NCCL_IB_DISABLE is 1", "unset NCCL_IB_DISABLE")
    if machine.locked_memory != UNLIMITED:
        return warning(
            name,
            f"{found}, but only {machine.locked_memory / 2**10:.0f} KiB of memory may be locked",
            "ulimit -l unlimited (Slurm: PropagateResourceLimitsExcept=MEMLOCK; Docker: --ulimit memlock=-1)",
        )
    return good(name, found)
