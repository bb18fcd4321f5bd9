"""Stock Megatron-LM with the two lines: what it prints, counts and keeps, against itself and one rank."""

import numpy as np
import pytest

from megatron_dynmix.cli import main
from tests.stock.engine import records, run_stock, updates_of
from tests.stock.states import assert_equal_states, state_of

GATE_LOAD = ("--dynmix-strategy", "gate-load", "--dynmix-interval", "2", "--dynmix-eta", "50")
EP2 = ("--expert-model-parallel-size", "2")


@pytest.mark.parametrize("ranks", [1, 2])
def test_uniform_prints_every_number_that_stock_prints(stock, ranks):
    flags = EP2 if ranks == 2 else ()
    plain = stock(ranks, *flags, weights=(1, 1, 1), mixed=False)
    uniform = stock(ranks, *flags, "--dynmix-strategy", "uniform", weights=(1, 1, 1))
    assert len(plain.printed) == 8
    assert uniform.printed == plain.printed


def test_gate_load_stopped_in_mid_interval_goes_on_to_the_bit(stock, tmp_path):
    save = ("--save", str(tmp_path / "ck"), "--save-interval", "3")
    whole = stock(2, *EP2, *GATE_LOAD, *save, "--dynmix-run-dir", str(tmp_path / "whole"))
    assert len(records(tmp_path / "whole")) == 3
    expected = state_of(tmp_path / "ck", 6)

    stopped = ("--save", str(tmp_path / "ck2"), "--save-interval", "3")
    flags = (*EP2, *GATE_LOAD, *stopped, "--dynmix-run-dir", str(tmp_path / "stopped"))
    first = stock(2, *flags, "--exit-interval", "3", "--num-workers", "1")
    second = stock(2, *flags, "--load", str(tmp_path / "ck2"))
    # the second report after a start is the mean of two iterations, in later versions of stock
    assert [*first.losses, second.losses[0]] == whole.losses[:4] and second.losses[-1] == whole.losses[-1]
    assert_equal_states(state_of(tmp_path / "ck2", 6), expected)
    assert updates_of(tmp_path / "stopped") == updates_of(tmp_path / "whole")
    for run_dir in ("whole", "stopped"):
        assert main(["verify", str(tmp_path / run_dir)]) == 0
    assert main(["report", str(tmp_path / "whole")]) == 0


LAYOUTS = {
    "ep2": (2, EP2),
    "ep2 distributed optimizer async save": (2, (*EP2, "--use-distributed-optimizer", "--async-save")),
    "ep2 full recompute": (
        2,
        (
            *EP2,
            *(
                "--recompute-granularity",
                "full",
                "--recompute-method",
                "uniform",
                "--recompute-num-layers",
                "1",
            ),
        ),
    ),
    "pp2": (2, ("--pipeline-model-parallel-size", "2")),
    "pp2 vpp2": (
        2,
        ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
    ),
    "tp2 sp": (
        2,
        ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1"),
    ),
    "cp2": (2, ("--context-parallel-size", "2", "--spec", "tests.stock.cp_spec", "layer_spec")),
    "tp2 sp ep2": (
        4,
        (
            *(
                "--tensor-model-parallel-size",
                "2",
                "--sequence-parallel",
                "--expert-tensor-parallel-size",
                "1",
            ),
            *("--expert-model-parallel-size", "4"),
        ),
    ),
    "pp2 ep2 full recompute": (
        4,
        (
            *("--pipeline-model-parallel-size", "2", *EP2),
            *(
                "--recompute-granularity",
                "full",
                "--recompute-method",
                "uniform",
                "--recompute-num-layers",
                "1",
            ),
        ),
    ),
}
"""Ranks and flags."""
SLOW = {"tp2 sp ep2", "pp2 ep2 full recompute"}


def save_initial(folder, prefixes, cache, *flags):
    """Save weights of four layers that every layout can begin from, and return flags that do so."""
    begin = [
        "--num-layers",
        "4",
        "--train-iters",
        "1",
        "--save",
        str(folder / "ck"),
        "--lr",
        "1e-9",
        "--min-lr",
        "0",
    ]
    blend = [word for prefix in prefixes for word in ("1", prefix)]
    argv = ["--data-path", *blend, "--data-cache-path", str(cache), *begin, *flags]
    ((code, text),) = run_stock(1, argv, folder / "log", mixed=False)
    assert code == 0, text[-3000:]
    return (
        "--num-layers",
        "4",
        "--load",
        str(folder / "ck"),
        "--finetune",
        "--no-load-optim",
        "--no-load-rng",
    )


@pytest.fixture(scope="session")
def initial(prefixes, cache, tmp_path_factory):
    return save_initial(tmp_path_factory.mktemp("initial"), prefixes, cache)


@pytest.fixture(scope="session")
def one_rank():
    return {}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAYOUTS]
)
def test_every_layout_counts_what_one_rank_counts(stock, initial, one_rank, tmp_path, layout):
    if not one_rank:
        one_rank["losses"] = stock(1, *initial, *GATE_LOAD, "--dynmix-run-dir", str(tmp_path / "one")).losses
        one_rank["updates"] = updates_of(tmp_path / "one")
    ranks, flags = LAYOUTS[layout]
    save = ("--save", str(tmp_path / "ck"))
    run = stock(ranks, *initial, *GATE_LOAD, *flags, *save, "--dynmix-run-dir", str(tmp_path / "run"))
    assert run.losses == pytest.approx(one_rank["losses"], abs=2e-4)
    first, expected = updates_of(tmp_path / "run")[0], one_rank["updates"][0]
    assert first["tokens"] == expected["tokens"] and first["rows"] == expected["rows"]
    stray = np.abs(np.array(first["load"]) - expected["load"]).max()
    assert stray < 2e-3, "a token or two may choose another expert"
    assert main(["verify", str(tmp_path / "run")]) == 0
