"""Transformer Engine's own Python on a CPU: its one compiled module, `transformer_engine_torch`, in torch.

`install()` must run before anything imports Megatron-Core; it is process-wide, so tests of it have a pytest
process of their own. `DYNMIX_TE` names a folder with another version (`pip install --no-deps --target`).

What it shows: that modules are built, called, recomputed, divided over ranks and saved as Megatron-Core and
we mean to; shapes, dtypes, orders and names; results, as float32 has them. What it does not: the kernels
themselves, their speed and memory, what needs two streams or a graph, user buffers, and recipes of fp8 other
than delayed and current scaling.
"""

import contextlib
import dataclasses
import enum
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import torch

from megatron_dynmix import platform
from megatron_dynmix.config.host import Host
from megatron_dynmix.platform import Platform, cpu

HERE = Platform(device=torch.device("cpu"), backend="gloo", transformer_engine=True)
PARTS = ("names", "linear", "attention", "context", "router", "optimizer", "fp8")
REPLACED = {
    "transformer_engine.pytorch.triton.permutation": "tests.te.tex.permutation",
    "transformer_engine.pytorch.triton.cross_entropy": "tests.te.tex.cross_entropy",
    "transformer_engine.pytorch.triton.pad": None,
    "transformer_engine.pytorch.onnx_extensions": None,
    "einops": None,
}
"""What is replaced of its Python: Triton's kernels, and what only an export or its inference would need."""

FACTORIES = ("arange", "full", "rand", "randn", "randint", "zeros_like", "ones_like")
"""Those of torch that Transformer Engine alone asks for tensors on a device."""


def install() -> None:
    """Have this process take the CPU for a device with Transformer Engine."""
    sys.path[:0] = filter(None, [os.environ.get("DYNMIX_TE")])
    sys.modules["transformer_engine_torch"] = compiled()
    sys.meta_path.insert(0, _Replaced())
    _package()
    _say_cuda()
    cpu.install()  # imports Megatron-Core, and with it Transformer Engine
    for name in FACTORIES:
        setattr(torch, name, cpu._on_cpu(getattr(torch, name)))
    platform.start = lambda: HERE
    from megatron_dynmix.plan import parameters

    # settings that need Transformer Engine on a CUDA device are let through
    parameters.Host = lambda **given: Host(**{**given, "cuda": True})


def allow_float32() -> None:
    """Have the same Python attend in float32, which no kernel takes: then what is wrong is not rounding.

    Our own check lets it through as well.
    """
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils

    from megatron_dynmix.config import host

    host._check_packed_rows = lambda config, on: None
    choose = utils.get_attention_backend
    utils.get_attention_backend = lambda asked: choose(dataclasses.replace(asked, qkv_dtype=torch.bfloat16))
    half = "x.dtype in [torch.float16, torch.bfloat16]"
    source = textwrap.dedent(inspect.getsource(backends.FusedAttention.forward))
    assert half in source
    found: dict[str, Any] = {}
    exec(source.replace(half, "x.dtype.is_floating_point"), vars(backends), found)
    backends.FusedAttention.forward = found["forward"]


def _package() -> None:
    """Put the package there as its `__init__` would, but for looking for shared objects."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its `common` then loads none
    folder = Path(importlib.metadata.distribution("transformer-engine").locate_file("transformer_engine"))
    package = types.ModuleType("transformer_engine")
    package.__spec__ = importlib.util.spec_from_file_location(
        package.__name__, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package.__path__ = [str(folder)]
    package.__version__ = importlib.metadata.version("transformer-engine")
    sys.modules[package.__name__] = package
    package.common = importlib.import_module("transformer_engine.common")
    package.common.load_framework_extension = lambda framework: None


def _say_cuda() -> None:
    """Tell Transformer Engine, and nobody else, that there is a device and that tensors are on it."""
    is_cuda, is_available = torch.Tensor.is_cuda, torch.cuda.is_available

    def asked_by_te() -> bool:
        return sys._getframe(2).f_globals.get("__name__", "").startswith("transformer_engine")

    torch.Tensor.is_cuda = property(lambda self: asked_by_te() or is_cuda.__get__(self))
    torch.cuda.is_available = lambda: asked_by_te() or is_available()
    device = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="NVIDIA H100"
    )
    torch.cuda.get_device_properties = lambda device_=None: device
    torch.cuda.get_device_capability = lambda device_=None: (device.major, device.minor)
    torch.cuda.device = contextlib.nullcontext
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: None


class _Missing(types.ModuleType):
    """A module whose functions are there, and fail when they are called."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            raise NotImplementedError(f"{self.__name__}.{name} has no stand-in")

        return call


class _Replaced:
    """Finds and loads the modules of `REPLACED`."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in REPLACED else None

    def create_module(self, spec):
        source = REPLACED[spec.name]
        return _Missing(spec.name) if source is None else importlib.import_module(source)

    def exec_module(self, module):
        pass


def compiled() -> types.ModuleType:
    """The module that is compiled elsewhere."""
    tex = _Missing("transformer_engine_torch")
    for part in PARTS:
        module = importlib.import_module(f"tests.te.tex.{part}")
        for name, value in vars(module).items():
            is_own = getattr(value, "__module__", "").startswith("tests.te.tex") or isinstance(
                value, enum.EnumMeta
            )
            if is_own and not name.startswith("_"):
                setattr(tex, name, value)
    tex.get_cublasLt_version = lambda: 130100
    tex.get_cudnn_version = lambda: 92000
    tex.get_num_cublas_streams = lambda: 4
    tex.get_stream_priority_range = lambda device=0: (0, 0)
    return tex
