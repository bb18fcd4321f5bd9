"""Megatron-Bridge itself on the CPU: Python 3.12, and a folder with its wheel in DYNMIX_MEGATRON_BRIDGE."""

import os

import pytest

from tests.bridge import stand_ins
from tests.distributed.ranks import CONTEXT
from tests.stock import data, engine

if os.environ.get(stand_ins.FOLDER):
    CONTEXT.set_forkserver_preload(["tests.bridge.preload"])


def pytest_collection_modifyitems(items):
    if not os.environ.get(stand_ins.FOLDER) or not engine.find_stock():
        reason = (
            f"{stand_ins.FOLDER} names no folder with megatron-bridge, or there is no Megatron-Core 0.19, "
            "which it needs (Python 3.12)"
        )
        for item in items:
            if item.path.is_relative_to(stand_ins.HERE):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def prefixes(tmp_path_factory):
    return data.write_sources(tmp_path_factory.mktemp("sources"))
