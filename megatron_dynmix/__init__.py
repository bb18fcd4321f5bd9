"""Megatron-DynMix: dynamic data mixing for Mixture-of-Experts fine-tuning, built into Megatron-Core."""

import importlib
from typing import Any

__version__ = "0.1.0"
PUBLIC = {"MixedRun": "training.mixed_run"}
"""What a training loop that is not ours may use, and where it is: imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # the CPU's stand-ins must be there before Megatron-Core is
    importlib.import_module(f"{__name__}.platform").start()
    return getattr(importlib.import_module(f"{__name__}.{PUBLIC[name]}"), name)
