"""The facts that checks look at, and how they are found: plain values, so that tests can invent machines."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform as python_platform
import resource
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import torch
from packaging.utils import canonicalize_name

from megatron_dynmix.platform import packages

if TYPE_CHECKING:
    from megatron_dynmix.config import RunConfig

UNLIMITED = -1
"""A limit that is not set."""
SMI = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
SMI_SECONDS = 20


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    memory: int
    """Bytes in all."""
    free: int
    """Bytes that no other process has."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What came of trying a folder."""

    path: str
    kind: str = "ext4"
    """Kind of file system."""
    free: int = 1000 * 2**30
    error: str = ""
    """Why a file could not be written, flushed and renamed; empty if it could."""
    seconds: float = 0.0
    """That it took."""
    skew: float = 0.0
    """Seconds by which the time of the new file is ahead of this machine's clock."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found; the defaults are those of a laptop on which all is well."""

    python: str = "3.11.0"
    requirements: tuple[str, ...] = ()
    """What this package says that it needs, as requirement lines, extras included."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Installed distributions by the name that indexes compare: `Flash_Attn` is `flash-attn`."""
    import_errors: Mapping[str, str] = field(default_factory=dict)
    """Why a compiled module that is installed fails to import, by module."""
    hybrid_ep: bool = False
    """Whether the DeepEP that is installed has HybridEP."""
    apex: Literal["none", "NVIDIA", "namesake"] = "none"
    flash_attention_range: tuple[str, str] | None = None
    """Versions that Transformer Engine accepts, least and greatest; None if it cannot be asked."""
    torch_cuda: str | None = None
    """CUDA that torch was built for; None for a CPU build."""
    cuda_available: bool = False
    cuda_error: str = ""
    driver: str | None = None
    """Version of the NVIDIA driver; None if there is none."""
    driver_cuda: str | None = None
    """Newest CUDA that the driver has, such as `12.4`."""
    gpus: tuple[Gpu, ...] = ()
    nccl: str | None = None
    gloo: bool = True
    infiniband: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ("lo", "eth0")
    environment: Mapping[str, str] = field(default_factory=dict)
    hostname: str = "laptop"
    addresses: Mapping[str, str | None] = field(default_factory=dict)
    """Names that were looked up, and their addresses; None for one that is not known."""
    port_is_free: bool | None = None
    """Whether MASTER_PORT can be listened on here; None if this rank will not do so, or the job has begun."""
    open_files: int = 65536
    locked_memory: int = UNLIMITED
    address_space: int = UNLIMITED
    """Soft limits; bytes for both memories."""
    shared_memory: int = 8 * 2**30
    """Bytes of /dev/shm."""
    memory: int = 16 * 2**30
    shared_dir: Path | None = None
    """The folder that all ranks are to share, if one was named or a run has one."""
    folder: Folder | None = None
    """What came of trying it; None where there is none."""
    config: RunConfig | None = None
    """The run that this machine is checked for, if there is one."""
    checkpoint_bytes: int | None = None
    """Size of one checkpoint of the run."""
    model_error: str = ""
    """Why the run's model cannot be sized."""


def look() -> Facts:
    """Look at this machine; a few seconds, most of them to import torch."""
    cuda_available, cuda_error = _cuda()
    environment, hostname, shared = dict(os.environ), socket.gethostname(), Path("/dev/shm")
    addresses = {name: _address(name) for name in (hostname, environment.get("MASTER_ADDR")) if name}
    installed = importlib.metadata.distributions()
    return Facts(
        python=python_platform.python_version(),
        requirements=_requirements(),
        versions={canonicalize_name(each.metadata["Name"] or ""): each.version for each in installed},
        import_errors={name: error for name in packages.COMPILED if (error := packages.import_error(name))},
        hybrid_ep=packages.has_hybrid_ep(),
        apex=_apex(),
        flash_attention_range=_flash_attention_range(),
        torch_cuda=torch.version.cuda,
        cuda_available=cuda_available,
        cuda_error=cuda_error,
        driver=_driver(),
        driver_cuda=_driver_cuda(),
        gpus=tuple(map(_gpu, range(torch.cuda.device_count()))) if cuda_available else (),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda_available else None,
        gloo=torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        infiniband=tuple(sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        environment=environment,
        hostname=hostname,
        addresses=addresses,
        port_is_free=_port_is_free(environment, addresses),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        address_space=resource.getrlimit(resource.RLIMIT_AS)[0],
        shared_memory=shutil.disk_usage(shared).total if shared.is_dir() else 0,
        memory=psutil.virtual_memory().total,
    )


def _requirements() -> tuple[str, ...]:
    try:
        return tuple(importlib.metadata.requires("megatron-dynmix") or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


def _apex() -> Literal["none", "NVIDIA", "namesake"]:
    if importlib.util.find_spec("apex") is None:
        return "none"
    try:
        is_nvidia = importlib.util.find_spec("apex.normalization.fused_layer_norm") is not None
    except Exception:  # the namesake imports Pyramid's modules, which may be missing
        is_nvidia = False
    return "NVIDIA" if is_nvidia else "namesake"


def _flash_attention_range() -> tuple[str, str] | None:
    try:
        module = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
        utils = module.FlashAttentionUtils
        return str(utils.version_required), str(utils.max_version)
    except Exception:  # not installed, broken, or of a version that says it elsewhere
        return None


def _cuda() -> tuple[bool, str]:
    """Return whether torch can use CUDA, and what it says if not."""
    if torch.version.cuda is None:
        return False, ""
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError and AssertionError of several kinds: their text is the finding
        return False, str(error).splitlines()[0]
    return torch.cuda.device_count() > 0, ""


def _gpu(index: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(torch.cuda.get_device_name(index), total, free)


def _driver() -> str | None:
    if shutil.which(SMI[0]) is None:
        return None
    done = subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _driver_cuda() -> str | None:
    """Ask the driver's own library, which is there without any toolkit."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _address(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _port_is_free(environment: Mapping[str, str], addresses: Mapping[str, str | None]) -> bool | None:
    """Try to listen on MASTER_PORT, before a job does; only rank 0 will, and others may come after it."""
    if environment.get("RANK", "0") != "0":
        return None
    name, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if name is None or not port.isdigit() or int(port) > 65535 or "TORCHELASTIC_RUN_ID" in environment:
        return None
    if addresses.get(name) not in {"127.0.0.1", addresses.get(socket.gethostname())}:
        return None
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("", int(port)))
        except OSError:
            return False
    return True


def nearest_folder(path: Path) -> Path:
    """Return the folder, or the next one above that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def try_folder(path: Path) -> Folder:
    """Write a file in a folder (see `nearest_folder`), flush it, rename it, remove it."""
    there = nearest_folder(path)
    draft = there / f".doctor-{os.getpid()}-{uuid.uuid4().hex}"
    final = draft.with_suffix(".done")
    begin, skew, error = time.monotonic(), 0.0, ""
    try:
        with draft.open("wb") as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
        skew = draft.stat().st_mtime - time.time()
        draft.rename(final)
        if final.read_bytes() != b"doctor":
            error = "what was written is not what is read"
    except OSError as failure:
        error = str(failure)
    finally:
        for left in (draft, final):
            left.unlink(missing_ok=True)
    seconds = time.monotonic() - begin
    free = shutil.disk_usage(there).free
    return Folder(path=str(path), kind=_kind(there), free=free, error=error, seconds=seconds, skew=skew)


def _kind(path: Path) -> str:
    """Return the file system of the deepest mount point above a path."""
    mounts = psutil.disk_partitions(all=True)
    above = [(len(one.mountpoint), one.fstype) for one in mounts if path.is_relative_to(one.mountpoint)]
    # of two that are mounted at one point, the later one is what is seen
    return max(reversed(above), key=lambda pair: pair[0])[1] if above else "unknown"
