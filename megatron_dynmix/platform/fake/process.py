"""A process in which torch's CUDA build believes that it has a device: what it needs, and its environment."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from megatron_dynmix.errors import InputError

SOURCE = Path(__file__).with_name("null_cuda.c")
LIBRARY = "libcuda.so.1"
"""The name that torch opens the driver by: loaded before everything, it is the runtime as well."""
ENGINE = "transformer-engine"


def what_is_missing(*, transformer_engine: bool) -> str | None:
    """Say what keeps this machine from running a fake GPU, and what would help; None if nothing does."""
    if sys.platform != "linux":
        return f"it needs Linux, whose loader can put a library before torch's own; this is {sys.platform}"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a CPU build, which has no autograd for CUDA tensors; install the "
            "CUDA build of torch, which needs no GPU"
        )
    if _compiler() is None:
        return "there is no C compiler (cc, gcc, clang, or $CC) for 50 lines of C; install one"
    if transformer_engine and engine_folder() is None:
        return (
            f"Transformer Engine's Python is not installed; pip install --no-deps {ENGINE}==2.11.0 einops "
            "onnx onnxscript onnx_ir ml_dtypes, which needs no GPU, or plan for --host cuda"
        )
    return None


def engine_folder() -> Path | None:
    """Return where Transformer Engine's Python for torch is, whether its C++ modules are there or not."""
    try:
        files = importlib.metadata.distribution(ENGINE)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(files.locate_file("transformer_engine")))
    return folder if (folder / "pytorch").is_dir() else None


def environment(folder: Path, rank: int, world_size: int) -> dict[str, str]:
    """Return the environment of rank `rank` of a job of which it is the only process.

    The library is compiled to `folder`, unless it is there.
    """
    library = folder / LIBRARY
    if not library.exists():
        command = [str(_compiler()), "-shared", "-fPIC", "-O1", f"-Wl,-soname,{LIBRARY}", "-o", str(library)]
        done = subprocess.run([*command, str(SOURCE)], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{command[0]} could not compile {SOURCE}: {done.stderr.strip()}")
    of_rank = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    # Transformer Engine looks for its C++ modules when it is imported, unless it is being built
    return {**os.environ, **of_rank, "LD_PRELOAD": str(library), "NVTE_PROJECT_BUILDING": "1"}


def _compiler() -> str | None:
    named = os.environ.get("CC")
    return next(filter(None, map(shutil.which, [named] if named else ["cc", "gcc", "clang"])), None)
