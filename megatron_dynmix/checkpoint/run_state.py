"""`run_state.json`: all of a run's state that is not a tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dynmix.errors import InputError

RUN_STATE = "run_state.json"
FORMAT_VERSION = 2


class Damaged(Exception):
    """A file of a checkpoint is not what was written; the message names it, what is expected and found."""


def read_run_state(source: Path) -> dict[str, Any]:
    """The run state of a checkpoint folder.

    Raises:
        Damaged: no run state that can be read.
        InputError: one of another version.

    """
    try:
        state = json.loads((source / RUN_STATE).read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{RUN_STATE} cannot be read ({error})") from None
    if not isinstance(state, dict) or not isinstance(state.get("format_version"), int):
        raise Damaged(f"{RUN_STATE} is no run state")
    version = state["format_version"]
    if version != FORMAT_VERSION:
        age, remedy = "a newer", "update megatron-dynmix"
        if version < FORMAT_VERSION:
            age = "an older"
            remedy = "go on with the version that began the run, or begin a run from its weights"
        raise InputError(
            f"{source} was written by {age} version (format {version}, this one reads {FORMAT_VERSION}); "
            f"{remedy}"
        )
    return dict(state)
