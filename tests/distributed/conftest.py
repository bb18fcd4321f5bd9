import pytest
import yaml

from megatron_dynmix.commands.quickstart import make_quickstart
from tests.distributed import programs
from tests.distributed.ranks import run_ranks

SMALL = [
    *("--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "4", "--num-layers", "3"),
    *("--seq-length", "128", "--micro-batch-size", "2", "--global-batch-size", "8", "--num-workers", "0"),
    *("--train-iters", "4", "--interval", "2", "--log-interval", "1", "--probe-tokens", "1024"),
    *("--lr", "1e-2", "--lr-warmup-iters", "0"),
]
"""A model small enough for seconds: three layers of eight experts."""


@pytest.fixture(scope="session")
def run_yaml(tmp_path_factory):
    """The quickstart's run with the published rule and a probe: all that a mixing interval can do."""
    path = make_quickstart(tmp_path_factory.mktemp("quickstart"))
    run = yaml.safe_load(path.read_text())
    run["mixing"] = {"strategy": "gate-load", "interval": 10, "signal": "probe"}
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def start_from(run_yaml, tmp_path_factory):
    """Flags: the small model, from weights that are the same in every layout."""
    run_dir = tmp_path_factory.mktemp("initial")
    one_rank = [*SMALL, "--expert-model-parallel-size", "1"]
    run_ranks(1, programs.save_initial_weights, run_yaml, one_rank, run_dir)
    return [*SMALL, "--pretrained-checkpoint", str(run_dir / "checkpoints")]


def quick_or_slow(names, quick):
    """Parameters of a table: those that `make test` runs, and those left to `make test-slow`."""
    assert quick <= set(names), quick - set(names)
    return [
        pytest.param(
            name,
            id=name if isinstance(name, str) else " to ".join(name),
            marks=() if name in quick else pytest.mark.slow,
        )
        for name in names
    ]
