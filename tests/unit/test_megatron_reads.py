"""A setting of Megatron-Core's either works, or is refused by name: none is taken and does nothing.

Which of them are read, and where, is looked up in the sources of the installed version.
"""

import json
import runpy
from pathlib import Path

import pytest

from megatron_dynmix import platform
from megatron_dynmix.config.decided import DECIDED
from megatron_dynmix.config.megatron_fields import megatron_fields

TOOLS = Path(__file__).parents[2] / "tools"
RECORD = TOOLS / "megatron_reads.json"
REMEDY = "python tools/megatron_reads.py tools/megatron_reads.json"
UNREAD = {"qk_l2_norm", "moe_per_layer_logging", "muon_momentum", "qk_clip_alpha", "fsdp_double_buffer"}
"""Settings that nothing reads, and that are refused for it: the search must see that."""
READ_LATER = {"qk_l2_norm"}
"""Those of them that Megatron-Core 0.19 reads."""

BY_NAME = {"moe_deepep_num_sms", "moe_hybridep_num_sms"}
"""Settings that Megatron-Core 0.19 reads by `getattr`, to carry them into the one that replaces them."""


@pytest.fixture(scope="module")
def tool():
    platform.start()
    return runpy.run_path(str(TOOLS / "megatron_reads.py"))


@pytest.fixture(scope="module")
def found(tool):
    return tool["reads"](tool["settable"]() | UNREAD)


def test_what_may_be_given_is_read_and_what_is_read_nowhere_is_refused(found):
    unread = {name for name, place in found.items() if not place} - BY_NAME
    missed = sorted(unread - UNREAD)
    assert not missed, f"{missed} would do nothing: refuse them in config/decided.py, with the reason"
    assert unread >= UNREAD - READ_LATER and DECIDED.keys() >= UNREAD


def test_every_setting_has_been_looked_at(tool, found):
    """One that is new is in neither table: somebody has to see that it works, or refuse it."""
    recorded = json.loads(RECORD.read_text())
    new = sorted(tool["settable"]() - recorded.keys())
    assert not new, f"{new} are new: see that each works on our path or refuse it, then run {REMEDY}"
    gone = sorted(recorded.keys() - {name for fields in megatron_fields().values() for name in fields})
    assert not gone and not recorded.keys() & DECIDED.keys(), f"{REMEDY}: {gone}"


def test_nothing_is_refused_that_megatron_core_does_not_have():
    assert not DECIDED.keys() - {name for fields in megatron_fields().values() for name in fields}
