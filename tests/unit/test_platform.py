import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from megatron_dynmix import platform
from megatron_dynmix.platform import packages
from megatron_dynmix.platform.cpu import uncompiled

LOOK = """
from torch.utils import cpp_extension  # torch's CUDA build looks at import, its CPU build when asked
cpp_extension._find_cuda_home()
cpp_extension.logger.warning("another warning")
import sys
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""
LINE = "No CUDA runtime is found, using CUDA_HOME="


@pytest.mark.parametrize(
    ("first", "heard"), [("", True), ("from megatron_dynmix import platform; platform.start()", False)]
)
def test_a_compiler_without_a_device_is_not_warned_of(first, heard, tmp_path):
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", first + LOOK],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (LINE in done.stderr) is heard, done.stderr
    assert "another warning" in done.stderr
    assert done.stdout == "[]\n", "neither is the compiler of torch loaded, which takes seconds"


@pytest.mark.parametrize("decorate", [uncompiled, uncompiled(), uncompiled(fullgraph=True)])
def test_what_would_be_compiled_is_left_as_it_is(decorate):
    assert decorate(len) is len


BROKEN = {
    "a mere folder": {},
    "an empty meta package": {"__init__.py": "raise RuntimeError('Found empty meta package\\nand more')"},
    "no extension for torch": {
        "__init__.py": "try:\n    from . import pytorch\nexcept ImportError:\n    pass",
        "pytorch/__init__.py": "raise ImportError('undefined symbol: _ZN5torch3jit17parseSchema')",
    },
    "no shared object": {
        "__init__.py": "import warnings; warnings.warn('could not find')",
        "pytorch/__init__.py": "raise FileNotFoundError('Could not find shared object file')",
    },
    "an empty part": {"__init__.py": "", "pytorch/__init__.py": ""},
    "an assertion": {"__init__.py": "assert False"},
}


def write_package(folder, files):
    (folder / "transformer_engine").mkdir()
    for name, text in files.items():
        path = folder / "transformer_engine" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """Write the files of a Transformer Engine that this process has not yet looked for."""

    def write(files):
        write_package(tmp_path, files)
        return packages

    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # one may be installed
    packages.import_error.cache_clear()
    yield write
    packages.hide("transformer_engine")
    packages.import_error.cache_clear()


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_imported_is_not_used(kind, engine, recwarn):
    packages = engine(BROKEN[kind])
    assert not packages.is_usable("transformer_engine")
    text = packages.transformer_engine_error()
    packages.hide_broken()
    if kind == "a mere folder":
        assert text == ""
    else:
        assert text.startswith("Transformer Engine is installed here, but cannot be imported (")
        assert packages.MEND_TE in text and "\n" not in text
        assert importlib.util.find_spec("transformer_engine") is None
        with pytest.raises(ImportError):
            importlib.import_module("transformer_engine.pytorch")
    assert not recwarn.list


def test_what_can_be_imported_is_used(engine):
    packages = engine({"__init__.py": "", "pytorch/__init__.py": "", "pytorch/fp8.py": ""})
    assert packages.is_usable("transformer_engine") and packages.transformer_engine_error() == ""
    packages.hide_broken()
    assert importlib.util.find_spec("transformer_engine") is not None


ON_CUDA = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
from megatron_dynmix import platform
here = platform.start()
assert here.device.type == "cuda" and not here.transformer_engine
assert "Found empty meta package" in here.transformer_engine_error
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
assert not multi_latent_attention.HAVE_TE and moe_utils.te_general_gemm is None
from megatron_dynmix.platform import versions
versions.recompute_without_compiler()  # which later versions need there, and a host of tests may lack
random._get_all_rng_states = lambda: ()
random._set_all_rng_states = lambda: None
random._fork_rng = __import__("contextlib").nullcontext
x = torch.arange(3.0, requires_grad=True)
kept = random.CheckpointWithoutOutput()
y = kept.checkpoint(torch.sin, x)
z = y * y
kept.discard_output_and_register_recompute(z)
z.sum().backward()
assert torch.equal(x.grad, (2 * x.sin() * x.cos()).detach())
"""


def test_megatron_core_is_completed_on_cuda_without_transformer_engine(tmp_path):
    """What `recompute_modules: [layernorm]` runs, and what the router and latent attention ask for."""
    write_package(tmp_path, BROKEN["an empty meta package"])
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_CUDA],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("kind", "visible", "ranks"), [("cpu", 0, 2), ("cuda", 1, 1), ("cuda", 8, 2)])
def test_a_machine_has_a_rank_for_each_gpu(kind, visible, ranks, monkeypatch):
    here = platform.Platform(device=torch.device(kind), backend="", transformer_engine=False)
    monkeypatch.setattr(platform, "start", lambda: here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert platform.most_ranks(2) == ranks


@pytest.mark.parametrize(
    ("device", "given"), [("cuda:1", {"device_id": torch.device("cuda:1")}), ("cpu", {})]
)
def test_a_rank_tells_nccl_its_device(device, given, monkeypatch):
    here = platform.Platform(device=torch.device(device), backend="nccl", transformer_engine=False)
    calls = []
    monkeypatch.setattr(platform, "start", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: calls.append(kwargs))
    platform.init_process_group(1.0, object())
    told = [{name: value for name, value in call.items() if name == "device_id"} for call in calls]
    assert told == [given]
