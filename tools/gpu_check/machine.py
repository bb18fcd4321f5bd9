"""What there is to run on, and the tests that need it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata

import torch

from megatron_dynmix import platform
from tools.gpu_check.supervise import Figures, Job

SHOWN = ("megatron-core", "transformer-engine", "triton", "numpy")


def device(job: Job, figures: Figures) -> None:
    """Say what computes, and with what."""
    here = platform.start()
    figures.update(
        python=sys.version.split()[0],
        torch=torch.__version__,
        transformer_engine_used=here.transformer_engine,
        **{name.replace("-", "_"): _version(name) for name in SHOWN},
    )
    assert job.tiny or here.device.type == "cuda", (
        "torch sees no CUDA device; --tiny tries the parts out on a CPU"
    )
    if here.device.type == "cuda":
        about = torch.cuda.get_device_properties(here.device)
        figures.update(device=about.name, gib=round(about.total_memory / 2**30, 1))
    else:
        figures["device"] = "cpu"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def tests(job: Job, figures: Figures) -> None:
    """Run tests/gpu; without a GPU they are all skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]
    figures["pytest"] = re.sub(r"^=+ | =+$", "", last)
    assert done.returncode == 0, f"pytest ended with exit code {done.returncode}"
