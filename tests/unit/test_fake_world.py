"""Worlds of 1,024 ranks in one process: do the counts' groups hold every token of a stage once?

Torch's fake process group makes groups of any world without its other ranks. Each rank runs in a process
of its own, because Megatron-Core keeps its groups in module globals.
"""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.distributed.ranks import CONTEXT

WORLD = 1024
LAYERS, HALVES, SOURCES, EXPERTS = 32, 2, 64, 256
LAYOUTS = {
    "TP2 PP4 EP8, ETP1": {"tp": 2, "pp": 4, "cp": 1, "ep": 8, "etp": 1},
    "TP2 PP4 EP8, ETP2": {"tp": 2, "pp": 4, "cp": 1, "ep": 8, "etp": 2},
    "TP2 CP2 PP4 EP8, ETP1": {"tp": 2, "pp": 4, "cp": 2, "ep": 8, "etp": 1},
    "TP2 CP2 PP4 EP8, ETP2": {"tp": 2, "pp": 4, "cp": 2, "ep": 8, "etp": 2},
    "TP8 CP4 PP8 EP64, ETP1": {"tp": 8, "pp": 8, "cp": 4, "ep": 64, "etp": 1},
    "EP8": {"tp": 1, "pp": 1, "cp": 1, "ep": 8, "etp": 1},
}


def join_fake_world(rank, sizes):
    """Be one rank of a world whose other ranks do not exist."""
    from megatron_dynmix import platform

    platform.start()
    import torch
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes["tp"],
        pipeline_model_parallel_size=sizes["pp"],
        context_parallel_size=sizes["cp"],
        expert_model_parallel_size=sizes["ep"],
        expert_tensor_parallel_size=sizes["etp"],
        create_gloo_process_groups=False,
    )


def groups_of_reduction(rank, sizes):
    """Ranks of each group that `reduce_counts` sums over, in its order, and the bytes of each message."""
    join_fake_world(rank, sizes)
    import torch

    from megatron_dynmix.moe.counter import reduce_counts

    asked = []

    def all_reduce(tensor, group):
        assert tensor.dtype == torch.int64
        members = torch.distributed.get_process_group_ranks(group)
        asked.append((members, tensor.numel() * tensor.element_size()))

    torch.distributed.all_reduce = all_reduce
    counts_HDLE = torch.ones(HALVES, SOURCES, LAYERS, EXPERTS, dtype=torch.int64)
    assert torch.equal(reduce_counts(counts_HDLE), counts_HDLE)
    return asked


def in_own_process(function, *args):
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(function, *args).result(timeout=120)


def expected_groups(sizes):
    """Groups of each kind from Megatron-Core's own generator, in the order of the reduction."""
    from megatron.core.parallel_state import RankGenerator

    expert_dp = WORLD // (sizes["etp"] * sizes["ep"] * sizes["pp"])
    experts = RankGenerator(
        tp=sizes["etp"], ep=sizes["ep"], dp=expert_dp, pp=sizes["pp"], cp=1, order="tp-cp-ep-dp-pp"
    )
    return {kind: experts.get_ranks(kind) for kind in ("ep", "tp", "dp", "pp")}


def sum_over(groups, holds):
    """All-reduce by hand: every rank's multiset of whose tokens its sum holds."""
    after = {}
    for group in groups:
        total = sum((holds[rank] for rank in group), Counter())
        after.update(dict.fromkeys(group, total))
    return after


@pytest.mark.parametrize("name", LAYOUTS)
def test_I6_the_reduction_holds_every_token_of_a_stage_once(name):
    """Each rank of a stage routes other tokens: slices of the sequence over TP and CP, other rows over DP."""
    sizes = LAYOUTS[name]
    groups = expected_groups(sizes)
    stage_size = WORLD // sizes["pp"]
    holds = {rank: Counter([rank]) for rank in range(WORLD)}
    for kind in ("ep", "tp", "dp"):
        holds = sum_over(groups[kind], holds)
    for rank in (0, 1, stage_size - 1, WORLD // 2 + 3, WORLD - 1):
        first = rank // stage_size * stage_size
        assert holds[rank] == Counter(range(first, first + stage_size))
    if sizes["pp"] > 1:  # stages hold disjoint layers, so each (rank, layers) counts once
        holds = sum_over(groups["pp"], holds)
    assert all(holds[rank] == Counter(range(WORLD)) for rank in (0, WORLD - 1))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "CP" in name or name == "EP8"])
@pytest.mark.parametrize("rank", [0, 517, WORLD - 1])
def test_I6_a_rank_reduces_over_the_groups_of_the_picture(name, rank):
    sizes = LAYOUTS[name]
    asked = in_own_process(groups_of_reduction, rank, sizes)
    wanted = [next(group for group in groups if rank in group) for groups in expected_groups(sizes).values()]
    assert [members for members, _ in asked] == [group for group in wanted if len(group) > 1]
    assert {size for _, size in asked} == {LAYERS * HALVES * SOURCES * EXPERTS * 8} == {8 * 2**20}


def test_the_expert_parallel_group_alone_would_not_do():
    """What the paper's text suggests misses most tokens: the check above can fail."""
    sizes = LAYOUTS["TP2 CP2 PP4 EP8, ETP1"]
    holds = {rank: Counter([rank]) for rank in range(WORLD)}
    holds = sum_over(expected_groups(sizes)["ep"], holds)
    assert len(holds[0]) == sizes["ep"] < WORLD // sizes["pp"]
