"""Stock Megatron-LM on the CPU: from the wheel (Python 3.12, 0.18 and later), or from a checked-out tag.

DYNMIX_MEGATRON_LM is the folder of a checked-out core_v0.16.1, whose own pretrain_gpt.py is then driven.
"""

import os
import shutil

import pytest

from tests.distributed.ranks import CONTEXT
from tests.stock import data, engine

CONTEXT.set_forkserver_preload(["tests.distributed.preload", "tests.stock.preload"])


def pytest_collection_modifyitems(items):
    if not engine.find_stock():
        reason = (
            "there is no megatron.training here: megatron-core has it from 0.17 on (Python 3.12); for 0.16.1 "
            f"give the folder of a checked-out tag as {engine.FOLDER}"
        )
        for item in items:
            if item.path.is_relative_to(engine.HERE):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def prefixes(tmp_path_factory):
    return data.write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def stock(prefixes, cache, tmp_path):
    """Run stock on the three sources: `stock(ranks, *flags)`; 0 is what it has to end with."""

    def run(world_size, *flags, code=0, weights=(0.5, 0.3, 0.2), **how):
        blend = [word for pair in zip(map(str, weights), prefixes, strict=True) for word in pair]
        argv = ["--data-path", *blend, "--data-cache-path", str(cache), *flags]
        number = len(os.listdir(tmp_path))
        ranks = engine.run_stock(world_size, argv, tmp_path / f"log{number}", **how)
        for rank, (ended, text) in enumerate(ranks):
            assert ended == code, f"rank {rank} ended with {ended}:\n{text[-3000:]}"
        return engine.Run([text for _, text in ranks])

    return run


@pytest.fixture
def copied(tmp_path):
    """Copy a folder, to go on from it twice."""
    return lambda folder, name: shutil.copytree(folder, tmp_path / name)
