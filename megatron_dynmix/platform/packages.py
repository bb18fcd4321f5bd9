"""Packages that are compiled for one torch and one CUDA: that one is installed says little.

Whoever wants to know whether such a package can be used asks here; nobody else looks for its folder.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import warnings

COMPILED = {
    "transformer_engine": "transformer_engine.pytorch.fp8",
    "flash_attn": "flash_attn",
    "deep_ep": "deep_ep",
}
"""Package -> the module of it that Megatron-Core tries to import."""
INSTALL_TE = (
    'pip install --no-build-isolation "transformer_engine[pytorch]>=2.9,<2.12", torch first, or use the '
    "NGC PyTorch image"
)
MEND_TE = (
    "pip uninstall transformer-engine transformer-engine-torch, and do without it, or install it again for "
    f"this torch: {INSTALL_TE}"
)


def is_installed(package: str) -> bool:
    """Whether there is such a package; a mere folder of that name is none."""
    if sys.modules.get(package) is not None:
        return True
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


@functools.cache
def import_error(package: str) -> str:
    """Return why an installed package cannot be imported, in one line; empty if it can, or is not there."""
    if not is_installed(package):
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is told once, by whoever asked
            importlib.import_module(COMPILED.get(package, package))
    except Exception as error:  # undefined symbols, missing libraries: whatever it is, it is not usable
        return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
    return ""


def is_usable(package: str) -> bool:
    """Whether a package is installed and can be imported."""
    return is_installed(package) and not import_error(package)


def has_hybrid_ep() -> bool:
    """Whether the DeepEP that can be used is built from the branch that has HybridEP."""
    return is_usable("deep_ep") and hasattr(importlib.import_module("deep_ep"), "HybridEPBuffer")


def hide(package: str) -> None:
    """Have every later import of a package fail as if it were not installed."""
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]


def hide_broken() -> None:
    """Hide what is installed and cannot be imported: Megatron-Core tries, and expects `ImportError` only."""
    for package in COMPILED:
        if import_error(package):
            hide(package)


def transformer_engine_error() -> str:
    """Return what is wrong with an installed Transformer Engine, and the remedy; empty if nothing is."""
    if error := import_error("transformer_engine"):
        return f"Transformer Engine is installed here, but cannot be imported ({error}); {MEND_TE}"
    return ""
