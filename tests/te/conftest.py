"""Ranks with Transformer Engine come from the fork server, ranks without are forks of this process."""

import importlib.metadata
import multiprocessing

import pytest

from tests.distributed import programs, ranks
from tests.distributed.conftest import SMALL, run_yaml  # noqa: F401
from tests.distributed.layouts import ep

PLAIN = multiprocessing.get_context("fork")
FLAGS = [*SMALL, "--num-layers", "4", "--lr", "1e-3", "--probe-tokens", "256"]


def pytest_collection_modifyitems(config, items):
    """Skip these where a process has other tests too: a fork server loads once, and for good."""
    here = [item for item in items if "tests/te" in item.nodeid]
    reasons = []
    if len(here) < len(items):
        reasons.append("these have a pytest process of their own: see the Makefile")
    try:
        importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        reasons.append("the Python of Transformer Engine is not installed: it is in the extra `dev`")
    for item in here:
        item.add_marker(pytest.mark.skipif(bool(reasons), reason="; ".join(reasons)))
    if here and not reasons:
        ranks.CONTEXT.set_forkserver_preload(["tests.te.preload"])


def run_plain(world_size, program, *args, **kwargs):
    """Like `run_ranks`, without Transformer Engine."""
    return ranks.run_ranks(world_size, program, *args, context=PLAIN, **kwargs)


@pytest.fixture(scope="session")
def plain_start(run_yaml, tmp_path_factory):  # noqa: F811
    """Flags: a small model, from weights saved without Transformer Engine."""
    folder = tmp_path_factory.mktemp("plain")
    run_plain(1, programs.save_initial_weights, run_yaml, [*FLAGS, *ep(1)], folder)
    return [*FLAGS, "--pretrained-checkpoint", str(folder / "checkpoints")]
