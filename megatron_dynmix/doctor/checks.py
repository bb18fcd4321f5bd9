"""What a check says.

Checks of what is installed.

Checks of GPUs, their driver and their network.

Checks of what a job is told: ranks, the place to meet, time-outs; and of what a process may use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from megatron_dynmix.doctor.machine import UNLIMITED, Machine, normalised

Status = Literal["OK", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    """What to do about it; empty where all is well."""


def good(name: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(name, "OK", found)


def warning(name: str, found: str, remedy: str) -> Finding:
    """It runs, but not as well as it could, or not everywhere."""
    return Finding(name, "warning", found, remedy)


def problem(name: str, found: str, remedy: str) -> Finding:
    """It does not run, or not rightly."""
    return Finding(name, "problem", found, remedy)


PYTHONS = ((3, 10), (3, 13))
"""Least and greatest that megatron-core 0.16.1 has wheels for."""
SHOWN = ("megatron-core", "torch", "numpy", "transformers", "tokenizers")
TE = "transformer-engine"
INSTALL_TE = (
    'pip install --no-build-isolation "transformer_engine[pytorch]>=2.9,<2.12", torch first, or use the '
)
INSTALL_TE += "NGC PyTorch image"
FLASH = "flash-attn"


def check_packages(machine: Machine) -> list[Finding]:
    """Every check of this file, in the order of the table."""
    return [
        python(machine),
        requirements(machine),
        transformer_engine(machine),
        apex(machine),
        flash_attention(machine),
    ]


def python(machine: Machine) -> Finding:
    """The versions that megatron-core 0.16.1 has wheels for."""
    version = Version(machine.python).release[:2]
    least, greatest = PYTHONS
    if least <= version <= greatest:
        return good("Python", machine.python)
    said = f"{'.'.join(map(str, least))} to {'.'.join(map(str, greatest))}"
    return problem(
        "Python", machine.python, f"megatron-core 0.16.1 has wheels for {said}: make a venv with one"
    )


def requirements(machine: Machine) -> Finding:
    """Everything that this package itself asks for, in the versions that it asks for."""
    name = "packages"
    if not machine.requirements:
        return problem(name, "megatron-dynmix is not installed, only found", "pip install -e . in its folder")
    wanted = [Requirement(line) for line in machine.requirements]
    bad = [
        f"{need.name} {machine.versions.get(normalised(need.name), 'is missing')} (needs {need.specifier})"
        for need in wanted
        if (need.marker is None or need.marker.evaluate({"extra": ""}))
        and not _met(need, machine.versions.get(normalised(need.name)))
    ]
    if bad:
        return problem(
            name, "; ".join(bad), "pip install -c constraints.txt -e . gives the versions of the tests"
        )
    shown = ", ".join(f"{each} {machine.versions[each]}" for each in SHOWN if each in machine.versions)
    return good(name, shown)


def _met(need: Requirement, version: str | None) -> bool:
    return version is not None and need.specifier.contains(version, prereleases=True)


def transformer_engine(machine: Machine) -> Finding:
    """Needed on GPUs to be fast, in the versions that megatron-core 0.16.1 was made for."""
    name = "Transformer Engine"
    version = machine.versions.get(TE)
    if not machine.cuda_available:
        return good(name, "not needed on a CPU" + (f" ({version} is installed)" if version else ""))
    if version is None:
        return warning(name, "not installed: plain torch layers, no grouped GEMM, no fusions", INSTALL_TE)
    if error := machine.import_errors.get("transformer_engine"):
        return problem(
            name,
            f"{version} fails to import: {error}",
            "it was compiled for another torch or CUDA: remove it, and build it again against this torch",
        )
    wanted = [Requirement(line) for line in machine.requirements if normalised(line).startswith(TE)]
    if wanted and not _met(wanted[0], version):
        return problem(name, f"{version} (megatron-core 0.16.1 needs {wanted[0].specifier})", INSTALL_TE)
    return good(name, version)


def apex(machine: Machine) -> Finding:
    """NVIDIA's, or the package of the same name on the Python package index."""
    if machine.apex == "namesake":
        return problem(
            "apex",
            "a package of the same name, not NVIDIA's: megatron-core takes it for NVIDIA's and fails",
            "pip uninstall apex; it is not needed (NVIDIA's is built from github.com/NVIDIA/apex)",
        )
    return good("apex", "NVIDIA's" if machine.apex == "NVIDIA" else "not installed, not needed")


def flash_attention(machine: Machine) -> Finding:
    """Only Transformer Engine uses it; it refuses versions that it does not know."""
    version = machine.versions.get(FLASH)
    if version is None:
        return good(FLASH, "not installed, not needed: Transformer Engine has attention of its own")
    if error := machine.import_errors.get("flash_attn"):
        return problem(
            FLASH, f"{version} fails to import: {error}", f"pip uninstall {FLASH}; it is not needed"
        )
    if machine.flash_attention_range is None:
        return good(FLASH, f"{version}, not used: only Transformer Engine would")
    least, greatest = machine.flash_attention_range
    if not Version(least) <= Version(version) <= Version(greatest):
        return warning(
            FLASH,
            f"{version}; this Transformer Engine takes {least} to {greatest} and will not use it",
            f"pip install --no-build-isolation {FLASH}=={greatest}, or uninstall it",
        )
    return good(FLASH, version)


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
