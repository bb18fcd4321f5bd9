"""Megatron-Bridge on a CPU: all of it is its own but packages that it imports and that are never called here.

DYNMIX_MEGATRON_BRIDGE names a folder with it and with what it reads its configuration by:
`pip install --no-deps --target FOLDER megatron-bridge omegaconf antlr4-python3-runtime==4.9.3`.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from unittest import mock

from tests.stock import engine

HERE = Path(__file__).parent
FOLDER = "DYNMIX_MEGATRON_BRIDGE"
ABSENT = ("transformer_engine", "megatron.energon", "modelopt", "nvidia_resiliency_ext", "hydra")
"""What is imported by name at its start, for models, data and checkpoints that are not used here."""


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of the packages that are absent, empty but for any name that is asked of it."""

    def find_spec(self, name, path, target=None):
        if any(name == package or name.startswith(f"{package}.") for package in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {}) if name[0].isupper() else mock.MagicMock(name=name)
        setattr(self, name, made)
        return made


def import_bridge():
    """Import its loop, after Megatron-Core, which so knows that there is no Transformer Engine."""
    if "megatron.bridge.training.pretrain" in sys.modules:
        return
    engine.import_stock()
    sys.path.append(os.environ[FOLDER])
    kept = sys.modules.pop("transformer_engine", None)
    finder = _Absent()
    sys.meta_path.insert(0, finder)
    try:
        import megatron.bridge.training.gpt_step
        import megatron.bridge.training.pretrain  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        sys.modules["transformer_engine"] = kept
