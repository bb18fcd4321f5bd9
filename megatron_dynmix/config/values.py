"""What one setting alone must be; a message names the setting, what was given, and what would do."""

from __future__ import annotations

import math
import re
from typing import Any, get_args

from megatron_dynmix.errors import InputError


def require(condition: bool, name: str, value: object, need: str) -> None:
    """Raise InputError unless `condition` holds of the setting `name`."""
    if not condition:
        raise InputError(f"{name} is {value!r}; it must be {need}")


def one_of(name: str, value: str, kind: Any) -> None:
    """Raise InputError unless `value` is one of the strings of the Literal `kind`."""
    allowed = get_args(kind)
    require(value in allowed, name, value, f"one of {', '.join(allowed)}")


def positive(section: object, prefix: str, *names: str) -> None:
    """Raise InputError unless these settings of a section are finite and above 0, or None."""
    for name in names:
        value = getattr(section, name)
        good = value is None or (value > 0 and math.isfinite(value))
        require(good, f"{prefix}.{name}", value, "a positive number")


def groups(pattern: str) -> int | None:
    """Groups of a regular expression; None if it is none."""
    try:
        return re.compile(pattern).groups
    except re.error:
        return None
