"""The table of checks: each looks at facts and says what it found, and what to do about what is not well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_dynmix.config.host import Host, check_host
from megatron_dynmix.doctor.facts import UNLIMITED, Facts
from megatron_dynmix.errors import InputError
from megatron_dynmix.platform.packages import INSTALL_TE, MEND_TE


@dataclass(frozen=True)
class Finding:
    """One line of what `doctor` prints."""

    status: Literal["OK", "warning", "problem"]
    """A warning runs, but not as well as it could, or not everywhere; a problem does not, or not rightly."""
    found: str
    remedy: str = ""
    """What to do about it; empty where all is well."""
    name: str = ""
    """That of its check in the table."""


good = partial(Finding, "OK")
warning = partial(Finding, "warning")
problem = partial(Finding, "problem")


def findings_of(facts: Facts) -> list[Finding]:
    """Carry out the checks of the table that apply."""
    findings = [(name, check(facts)) for name, check in CHECKS]
    return [dataclasses.replace(finding, name=name) for name, finding in findings if finding is not None]


# ---- what is installed

PYTHONS = SpecifierSet(">=3.10,<3.14")
SHOWN = ("megatron-core", "torch", "numpy", "transformers", "tokenizers")
TE = "transformer-engine"
FLASH = "flash-attn"


def python(facts: Facts) -> Finding:
    """Check for the versions that megatron-core has wheels for."""
    if PYTHONS.contains(facts.python, prereleases=True):
        return good(facts.python)
    return problem(facts.python, "megatron-core has wheels for 3.10 to 3.13 only: make a venv with one")


def packages(facts: Facts) -> Finding:
    """Check everything that this package itself asks for, in the versions that it asks for."""
    if not facts.requirements:
        return problem("megatron-dynmix is not installed, only found", "pip install -e . in its folder")
    bad = [
        f"{need.name} {_version(need, facts) or 'is missing'} (needs {need.specifier})"
        for need in map(Requirement, facts.requirements)
        if (need.marker is None or need.marker.evaluate({"extra": ""})) and not _met(need, facts)
    ]
    if bad:
        return problem("; ".join(bad), "pip install -c constraints.txt -e . gives the versions of the tests")
    return good(", ".join(f"{name} {facts.versions[name]}" for name in SHOWN if name in facts.versions))


def _version(need: Requirement, facts: Facts) -> str:
    return facts.versions.get(canonicalize_name(need.name), "")


def _met(need: Requirement, facts: Facts) -> bool:
    version = _version(need, facts)
    return version != "" and need.specifier.contains(version, prereleases=True)


def transformer_engine(facts: Facts) -> Finding:
    """Check for what is needed on GPUs to be fast."""
    version = facts.versions.get(TE)
    if not facts.cuda_available:
        return good("not needed on a CPU" + (f" ({version} is installed)" if version else ""))
    if version is None:
        return warning("not installed: plain torch layers, no grouped GEMM, no fusions", INSTALL_TE)
    if error := facts.import_errors.get("transformer_engine"):
        return problem(
            f"{version} fails to import: {error}",
            MEND_TE,
        )
    for need in map(Requirement, facts.requirements):
        if canonicalize_name(need.name) == TE and not _met(need, facts):
            return problem(f"{version} (megatron-core 0.16.1 needs {need.specifier})", INSTALL_TE)
    return good(version)


def apex(facts: Facts) -> Finding:
    """Tell NVIDIA's from the package of the same name on the Python package index."""
    if facts.apex == "namesake":
        return problem(
            "a package of the same name, not NVIDIA's: megatron-core takes it for NVIDIA's and fails",
            "pip uninstall apex; it is not needed (NVIDIA's is built from github.com/NVIDIA/apex)",
        )
    return good("NVIDIA's" if facts.apex == "NVIDIA" else "not installed, not needed")


def flash_attention(facts: Facts) -> Finding:
    """Check for what only Transformer Engine uses, which refuses versions that it does not know."""
    version = facts.versions.get(FLASH)
    if version is None:
        return good("not installed, not needed: Transformer Engine has attention of its own")
    if error := facts.import_errors.get("flash_attn"):
        return problem(f"{version} fails to import: {error}", f"pip uninstall {FLASH}; it is not needed")
    if facts.flash_attention_range is None:
        return good(f"{version}, not used: only Transformer Engine would")
    least, greatest = facts.flash_attention_range
    if not Version(least) <= Version(version) <= Version(greatest):
        return warning(
            f"{version}; this Transformer Engine takes {least} to {greatest} and will not use it",
            f"pip install --no-build-isolation {FLASH}=={greatest}, or uninstall it",
        )
    return good(version)


# ---- GPUs and the network between them

GIB = 2**30
BUSY_SHARE = 0.9
"""Share of a GPU's memory; with less of it free another process is using the GPU."""


def cuda(facts: Facts) -> Finding:
    """Check that torch's CUDA and the driver's go together."""
    if facts.torch_cuda is None and facts.driver is None:
        return good("none: runs on the CPU, over gloo")
    if facts.torch_cuda is None:
        return problem(
            f"there is a driver ({facts.driver}), but this torch is built for CPUs",
            "install a CUDA build of torch (pytorch.org/get-started), then what is compiled against it",
        )
    if facts.cuda_available:
        return good(f"torch's {facts.torch_cuda}, the driver's {facts.driver_cuda or 'unknown'}")
    if facts.driver is None and facts.driver_cuda is None:
        return good(f"no driver, so torch's CUDA {facts.torch_cuda} is not used: runs on the CPU")
    newest = Version(facts.driver_cuda or facts.torch_cuda).major
    if newest < Version(facts.torch_cuda).major:
        return problem(
            f"torch is built for CUDA {facts.torch_cuda}, the driver ({facts.driver}) has "
            f"{facts.driver_cuda}",
            f"a newer driver, or a torch that is built for CUDA {newest}",
        )
    return problem(
        f"torch cannot use the GPUs: {facts.cuda_error or 'no device is visible'}",
        "look at nvidia-smi and CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all",
    )


def gpus(facts: Facts) -> Finding:
    """Check that they are alike, and that nobody else is using them."""
    if not facts.gpus:
        return good("none")
    kinds = sorted({gpu.name for gpu in facts.gpus})
    memory = min(gpu.memory for gpu in facts.gpus) / GIB
    found = f"{len(facts.gpus)} x {' and '.join(kinds)}, {memory:.0f} GiB"
    if len(kinds) > 1:
        return warning(found, "the slowest decides; choose with CUDA_VISIBLE_DEVICES")
    busy = [str(index) for index, gpu in enumerate(facts.gpus) if gpu.free < BUSY_SHARE * gpu.memory]
    if busy:
        least = min(gpu.free for gpu in facts.gpus) / GIB
        return warning(
            f"{found}; other processes use number {', '.join(busy)}: {least:.0f} GiB are free",
            "nvidia-smi shows them; end them, or choose others with CUDA_VISIBLE_DEVICES",
        )
    return good(found)


def backends(facts: Facts) -> Finding:
    """Check for gloo, and for NCCL beside it on GPUs."""
    if not facts.gloo:
        return problem("this torch has no gloo", "install an official build of torch")
    if not facts.cuda_available:
        return good("gloo")
    if facts.nccl is None:
        return problem("this torch has no NCCL", "install an official CUDA build of torch")
    return good(f"NCCL {facts.nccl}, gloo")


def infiniband(facts: Facts) -> Finding:
    """Check that NCCL can use the adapters that are there."""
    if not facts.infiniband:
        return good("none: several nodes would talk over Ethernet")
    found = ", ".join(facts.infiniband)
    if facts.environment.get("NCCL_IB_DISABLE") == "1":
        return warning(f"{found}, but NCCL_IB_DISABLE is 1", "unset NCCL_IB_DISABLE")
    if facts.locked_memory != UNLIMITED:
        return warning(
            f"{found}, but only {facts.locked_memory / 2**10:.0f} KiB of memory may be locked",
            "ulimit -l unlimited (Slurm: PropagateResourceLimitsExcept=MEMLOCK; Docker: --ulimit memlock=-1)",
        )
    return good(found)


# ---- what a job is told, and what a process may use

TOGETHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BELOW = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
SAME = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"))
"""Variables of a job that `srun` started: a rank of `torchrun` has a number of its own."""
OLD_NAMES = ("NCCL_ASYNC_ERROR_HANDLING", "NCCL_BLOCKING_WAIT", "NCCL_DESYNC_DEBUG")
OFF = ("0", "false", "no")
OPEN_FILES = 4096
SHARED_MEMORY = GIB


def ranks(facts: Facts) -> Finding:
    """Check that the variables of torchrun and Slurm agree with one another and with the GPUs."""
    given, numbers = facts.environment, {}
    for variable in {name for pair in (*BELOW, *SAME) for name in pair} & given.keys():
        if not given[variable].isdigit():
            return problem(f"{variable} is {given[variable]!r}", f"set {variable} to a whole number")
        numbers[variable] = int(given[variable])
    missing = [variable for variable in TOGETHER if variable not in given]
    if "RANK" in given and missing:
        found = f"{', '.join(name for name in TOGETHER if name in given)} set, but not {', '.join(missing)}"
        return problem(found, "start ranks with torchrun or srun, which set all four, or unset RANK")
    for rank, size in BELOW:
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            found = f"{rank} is {numbers[rank]}, but {size} is {numbers[size]}"
            return problem(found, "unset both: they are left over from another job, or copied wrongly")
    for ours, slurms in () if "TORCHELASTIC_RUN_ID" in given else SAME:
        if ours in numbers and slurms in numbers and numbers[ours] != numbers[slurms]:
            found = f"{ours} is {numbers[ours]}, but {slurms} is {numbers[slurms]}"
            return problem(found, f"unset {ours}: `train` takes it from Slurm")
    local = numbers.get("LOCAL_WORLD_SIZE", 1)
    if facts.gpus and local > len(facts.gpus):
        found = f"{local} ranks on this node, but {len(facts.gpus)} GPUs"
        return problem(found, "start as many ranks as there are GPUs (--nproc-per-node)")
    return good(f"rank {given['RANK']} of {given['WORLD_SIZE']}" if "RANK" in given else "not in a job")


def meeting_place(facts: Facts) -> Finding:
    """Check that ranks can find MASTER_ADDR, and listen on MASTER_PORT."""
    address, port = facts.environment.get("MASTER_ADDR"), facts.environment.get("MASTER_PORT")
    if address is not None and facts.addresses.get(address) is None:
        remedy = "give the first node's name as the others know it (scontrol show hostnames), or its address"
        return problem(f"MASTER_ADDR is {address}, which has no address here", remedy)
    if port is not None and not (port.isdigit() and 0 < int(port) < 65536):
        return problem(f"MASTER_PORT is {port!r}", "give a number from 1 to 65535")
    if facts.port_is_free is False:
        remedy = "choose another MASTER_PORT, or end what is left of the last job"
        return problem(f"MASTER_PORT {port} is in use on this machine", remedy)
    if facts.addresses.get(facts.hostname) is None:
        return warning(
            f"this machine's own name, {facts.hostname}, has no address",
            f"add a line '127.0.1.1 {facts.hostname}' to /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    return good(f"{address}:{port}" if address else f"{facts.hostname} is known by name")


def interfaces(facts: Facts) -> Finding:
    """Check that the network interfaces that NCCL and gloo are told to use are there."""
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = facts.environment.get(variable, "^")
        if wanted.startswith("^"):
            continue
        exact = wanted.startswith("=") or variable.startswith("GLOO")
        missing = [
            one
            for one in wanted.lstrip("=").split(",")
            if not any(each == one if exact else each.startswith(one) for each in facts.interfaces)
        ]
        if missing:
            found = f"{variable} is {wanted}, but there is no {', '.join(missing)}"
            return problem(found, f"use one of {', '.join(facts.interfaces)}, or unset it")
    return good(", ".join(facts.interfaces))


def time_outs(facts: Facts) -> Finding:
    """Check that a rank that hangs can be noticed."""
    given = facts.environment
    if given.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "").lower() in OFF:
        return problem(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING is off: a job whose rank is lost hangs until it is cancelled",
            "unset TORCH_NCCL_ASYNC_ERROR_HANDLING",
        )
    if old := [variable for variable in OLD_NAMES if variable in given]:
        remedy = f"set {', '.join(f'TORCH_{variable}' for variable in old)} instead, or nothing"
        return warning(f"{', '.join(old)} set, which torch no longer goes by", remedy)
    if given.get("CUDA_LAUNCH_BLOCKING") == "1":
        return warning("CUDA_LAUNCH_BLOCKING is 1: every kernel is waited for", "unset it to train")
    return good("as torch has them; collectives wait distributed_timeout_minutes")


def open_files(facts: Facts) -> Finding:
    """Check the limit: sources, workers, sockets and shards are all open files."""
    if facts.open_files == UNLIMITED or facts.open_files >= OPEN_FILES:
        return good("unlimited" if facts.open_files == UNLIMITED else str(facts.open_files))
    found = f"{facts.open_files} may be open in a process"
    return warning(found, "ulimit -n 65536 (Docker: --ulimit nofile=65536)")


def shared_memory(facts: Facts) -> Finding:
    """Check /dev/shm, where data workers and NCCL hand tensors over."""
    found = f"{facts.shared_memory / GIB:.1f} GiB in /dev/shm"
    if facts.shared_memory < SHARED_MEMORY:
        remedy = "in a container: --ipc=host or --shm-size=16g (Kubernetes: an emptyDir with medium Memory)"
        return warning(found, remedy)
    return good(found)


def address_space(facts: Facts) -> Finding:
    """Check the limit: memory-mapped sources and CUDA take far more addresses than memory."""
    found = f"{facts.memory / GIB:.0f} GiB of memory"
    if facts.address_space == UNLIMITED:
        return good(found)
    found += f", and a limit of {facts.address_space / GIB:.0f} GiB on addresses"
    return warning(found, "ulimit -v unlimited: it counts what is only mapped")


# ---- the folder that all ranks share

SKEW_SECONDS = 2.0
"""Between this machine's clock and that of the file server."""
SLOW_SECONDS = 5.0
"""To write, flush and rename one small file."""
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "ramfs", "vfat", "apfs")
NFS = "other nodes may see new files some seconds late; saves wait for that"
NOTES = {"nfs": NFS, "nfs4": NFS, "lustre": "stripe the checkpoint folder wide (lfs setstripe -c -1)"}


def shared_folder(facts: Facts) -> Finding | None:
    """Say why no folder was tried."""
    if facts.folder is not None:
        return None
    if facts.shared_dir is None:
        return good("not tried: give --shared-dir DIR or RUN.yaml")
    return problem(f"{facts.shared_dir} is no folder", "make it, or give another --shared-dir")


def writing(facts: Facts) -> Finding | None:
    """Check that a small file can be written, flushed and renamed, and how fast."""
    if (folder := facts.folder) is None:
        return None
    if folder.error:
        remedy = "another folder, or its permissions and quota (quota -s, lfs quota)"
        return problem(f"{folder.path}: {folder.error}", remedy)
    found = f"{folder.path}: a file is written, flushed and renamed in {folder.seconds * 1000:.0f} ms"
    if folder.seconds > SLOW_SECONDS:
        return warning(found, "the file server is overloaded or far away; try another one")
    return good(found)


def file_system(facts: Facts) -> Finding | None:
    """Check that other nodes see the folder, as far as the kind of its file system tells."""
    if (folder := facts.folder) is None:
        return None
    if folder.kind not in LOCAL:
        return good(f"{folder.kind}{f': {NOTES[folder.kind]}' if folder.kind in NOTES else ''}")
    if (nodes := _nodes(facts.environment)) > 1:
        return problem(
            f"{folder.path} is on {folder.kind}, which this node alone sees; the job has {nodes} nodes",
            "put sources, prepared_dir and --run-dir on a file system that all nodes share",
        )
    return good(f"{folder.kind}, of this node only")


def _nodes(environment: Mapping[str, str]) -> int:
    """Return the nodes of the job that this process is in; 1 outside of one."""
    names = ("SLURM_JOB_NUM_NODES", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    given = (environment.get(name, "") for name in names)
    nodes, ranks, each = (int(value) if value.isdigit() else None for value in given)
    if nodes is not None:
        return nodes
    return -(-ranks // each) if ranks is not None and each else 1


def space(facts: Facts) -> Finding | None:
    """Check that two checkpoints fit: the newest is removed only when the next is whole."""
    if (folder := facts.folder) is None:
        return None
    found = f"{folder.free / GIB:.0f} GiB are free"
    if (checkpoint := facts.checkpoint_bytes) is None:
        return good(found)
    found += f", a checkpoint of this run is {checkpoint / GIB:.1f} GiB"
    if folder.free < 2 * checkpoint:
        return problem(found, "make room for two, or give a smaller checkpoint.keep_last")
    return good(found)


def clock(facts: Facts) -> Finding | None:
    """Check that this machine and the file server agree on the time."""
    if (folder := facts.folder) is None:
        return None
    if abs(folder.skew) > SKEW_SECONDS:
        found = f"new files are {folder.skew:+.1f} s off this machine's clock"
        return warning(found, "synchronize the clocks (chrony, ntpd): times in logs will not compare")
    return good("agrees with the file system's")


# ---- whether this machine can follow the settings of a run

SHORT_MINUTES = 5.0


def run_settings(facts: Facts) -> Finding | None:
    """Check that this machine can follow every setting of the run."""
    if facts.config is None:
        return None
    host = Host(
        cuda=facts.cuda_available,
        transformer_engine=TE in facts.versions and "transformer_engine" not in facts.import_errors,
        deep_ep="deep-ep" in facts.versions and "deep_ep" not in facts.import_errors,
        hybrid_ep=facts.hybrid_ep,
        wandb="wandb" in facts.versions,
    )
    try:
        check_host(facts.config, host)
    except InputError as error:
        return problem(str(error), "or run it on a machine that has what is missing")
    if facts.model_error:
        return problem(facts.model_error, "plan RUN.yaml --world-size N says more")
    return good("this machine can follow every setting")


def run_time_out(facts: Facts) -> Finding | None:
    """Check that a slow save is not taken for a lost rank."""
    minutes = facts.config.parallel.distributed_timeout_minutes if facts.config else SHORT_MINUTES
    if minutes >= SHORT_MINUTES:
        return None
    found = f"distributed_timeout_minutes is {minutes:g}: a slow save or start looks like a lost rank"
    return warning(found, "leave it out (10), or give more for large models")


def connections(facts: Facts) -> Finding | None:
    """Check what lets kernels and sends overlap on GPUs."""
    if facts.config is None or not facts.cuda_available:
        return None
    sizes = [facts.config.parallel.size(f"{name}_parallel_size") for name in ("tensor_model", "context")]
    if max(sizes) == 1 or facts.environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        return None
    return warning(
        "CUDA_DEVICE_MAX_CONNECTIONS is not 1, with tensor or context parallelism",
        "export CUDA_DEVICE_MAX_CONNECTIONS=1: on Hopper and older, sends and kernels overlap only so",
    )


Check = Callable[[Facts], Finding | None]
"""What was found; None where the check does not apply."""

CHECKS: tuple[tuple[str, Check], ...] = (
    ("Python", python),
    ("packages", packages),
    ("Transformer Engine", transformer_engine),
    ("apex", apex),
    (FLASH, flash_attention),
    ("CUDA", cuda),
    ("GPUs", gpus),
    ("NCCL, gloo", backends),
    ("InfiniBand", infiniband),
    ("ranks", ranks),
    ("meeting place", meeting_place),
    ("interfaces", interfaces),
    ("time-outs", time_outs),
    ("open files", open_files),
    ("shared memory", shared_memory),
    ("memory", address_space),
    ("shared folder", shared_folder),
    ("writing", writing),
    ("file system", file_system),
    ("space", space),
    ("clock", clock),
    ("RUN.yaml", run_settings),
    ("run's time-out", run_time_out),
    ("connections", connections),
)
"""In the order in which they are printed."""
FOR_MEETING = ("ranks", "meeting place", "interfaces", "time-outs", "open files", "shared memory", "memory")
"""With a problem in one of these the ranks would only wait for one another."""
