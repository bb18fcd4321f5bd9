"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
