"""What each rank saves of the optimizer's state is its part of what Megatron-Core gathers, bit for bit.

With one bucket: where several end in padding, what it gathers is shifted (`test_gathering.py` has such runs).
"""

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_dynmix.checkpoint.model_weights import model_state
from megatron_dynmix.config.load import load_config
from megatron_dynmix.model import optimizer as optimizers
from megatron_dynmix.training import run as training_run
from megatron_dynmix.training.setup import check_before_start, prepare_run
from tests.distributed import programs
from tests.distributed.conftest import SMALL, quick_or_slow
from tests.distributed.layouts import CP2, ETP1, GATHER, INSTANCES, PP2, TP2, VPP2, ep
from tests.distributed.ranks import run_ranks

LAYOUTS = {
    "EP2": (2, ep(2)),
    "DP2, bf16": (2, [*ep(1), "--bf16"]),
    "DP4, overlapped": (4, [*ep(1), *GATHER]),
    "EP2 x DP2, shared experts": (4, [*ep(2), "--moe-shared-expert-intermediate-size", "24"]),
    "TP2 x EP2, ETP1": (4, [*TP2, *ETP1, *ep(2)]),
    "TP2, ETP1": (2, [*TP2, *ETP1, *ep(1)]),
    "CP2, ETP2": (2, [*CP2, "--expert-tensor-parallel-size", "2", *ep(1)]),
    "PP2 x DP2, tied embeddings": (4, [*PP2, *ep(2), "--no-untie-embeddings-and-output-weights"]),
    "DP4, two instances": (4, [*ep(1), *INSTANCES]),
    "EP2 x DP2, two instances": (4, [*ep(2), *INSTANCES]),
    "PP2 VPP2": (2, [*VPP2, *ep(1)]),
}


def own_and_gathered(run_yaml, flags, run_dir):
    """This rank's boxes, and the slices of its stage as Megatron-Core gathers them."""
    trainer = programs.train_from(load_config(run_yaml, flags), run_dir)
    own, gathered = [], []
    for part in optimizers._parts(trainer.optimizer):
        model = model_state(trainer.run.chunks)
        own += _found(optimizers._own_state(part, model, loading=False))
        gathered += _found(part.sharded_param_state_fully_reshardable(model, metadata={}))
    return own, gathered


def _found(state):
    apply_factories(state)
    return [
        (
            *(item.key, item.global_shape, item.global_offset, is_main(item)),
            item.data.reshape((1,) * item.prepend_axis_num + item.local_shape).numpy().copy(),
        )
        for item in nested_values(state)
        if isinstance(item, ShardedTensor)
    ]


def is_main(item):
    return not any(item.replica_id) if isinstance(item.replica_id, tuple) else item.replica_id == 0


@pytest.mark.parametrize("layout", quick_or_slow(LAYOUTS, {"EP2"}))
def test_boxes_are_parts_of_what_would_be_gathered(layout, run_yaml, tmp_path):
    world_size, flags = LAYOUTS[layout]
    flags = [*SMALL, "--num-layers", "4", "--train-iters", "2", "--strategy", "fixed", *flags]
    answers = run_ranks(world_size, own_and_gathered, run_yaml, flags, tmp_path)
    seen, whole = {}, {}
    for own, gathered in answers:
        slices = {}
        for name, _, offset, main, values in gathered:
            slices.setdefault(name, []).append((np.array(offset), values))
            if main:
                whole[name] = whole.get(name, 0) + values.size
        for name, shape, offset, main, values in own:
            assert values.dtype == np.float32
            _assert_within(slices[name], np.array(offset), values, name)
            if main:
                places = seen.setdefault(name, np.zeros(shape, np.int8))
                places[
                    tuple(slice(low, low + size) for low, size in zip(offset, values.shape, strict=True))
                ] += 1
    assert seen.keys() == whole.keys() and any("exp_avg_sq" in name for name in seen)
    for name, places in seen.items():
        assert places.max() == 1 and places.sum() == whole[name], name


INSTANCED = [*SMALL, "--num-layers", "4", "--train-iters", "2", "--strategy", "fixed"]
SAVED = {"DP4": [*ep(1), *INSTANCES], "EP2 x DP2": [*ep(2), *INSTANCES]}
"""Layouts of four ranks in two instances."""
ELSEWHERE = {
    "1 rank": (1, ep(1)),
    "EP2": (2, ep(2)),
    "DP4": (4, ep(1)),
    "DP4, two instances": (4, [*ep(1), *INSTANCES]),
    "TP2 x EP2, ETP1, two instances": (4, [*TP2, *ETP1, *ep(2), *INSTANCES]),
    "PP2 x DP2, two instances": (4, [*PP2, *ep(1), *INSTANCES]),
}


def boxes_of(trainer):
    """This rank's boxes of the optimizer's state."""
    model = model_state(trainer.run.chunks)
    parts = optimizers._parts(trainer.optimizer)
    return [box for part in parts for box in _found(optimizers._own_state(part, model, loading=False))]


def saved_boxes(run_yaml, flags, run_dir):
    """Of a run that has saved its state at its end."""
    trainer = programs.train_from(load_config(run_yaml, flags), run_dir)
    torch.distributed.barrier()
    return boxes_of(trainer)


def loaded_boxes(run_yaml, flags, run_dir, source):
    """Of a trainer that was built at a saved state."""
    config = load_config(run_yaml, flags)
    training_run.join_job(config)
    prepared = prepare_run(check_before_start(config))
    return boxes_of(training_run.build_trainer(prepared, run_dir, resume="must", source=source))


def whole(answers):
    """Name -> the whole tensor that all ranks' boxes make; where two have the same, they agree."""
    tensors = {}
    for name, shape, offset, _, values in (box for boxes in answers for box in boxes):
        tensor = tensors.setdefault(name, np.full(shape, np.nan, np.float32))
        place = tuple(slice(low, low + size) for low, size in zip(offset, values.shape, strict=True))
        there = ~np.isnan(tensor[place])
        np.testing.assert_array_equal(tensor[place][there], values[there], err_msg=name)
        tensor[place] = values
    assert not any(np.isnan(tensor).any() for tensor in tensors.values())
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("saved", SAVED)
def test_state_of_several_instances_is_loaded_elsewhere_bit_for_bit(saved, precision, run_yaml, tmp_path):
    flags = [*INSTANCED, *(["--bf16"] if precision == "bf16" else [])]
    there = whole(run_ranks(4, saved_boxes, run_yaml, [*flags, *SAVED[saved]], tmp_path / "saved"))
    assert any("exp_avg_sq" in name for name in there)
    source = tmp_path / "saved/checkpoints/iter_0000002"
    for layout, (world_size, parallel) in ELSEWHERE.items():
        run = (run_yaml, [*flags, *parallel], tmp_path / layout, source)
        here = whole(run_ranks(world_size, loaded_boxes, *run))
        assert here.keys() == there.keys(), layout
        for name, tensor in there.items():
            np.testing.assert_array_equal(here[name], tensor, err_msg=f"{layout}: {name}")


def _assert_within(slices, offset, values, name):
    for start, whole in slices:
        low, high = offset - start, offset - start + values.shape
        if (low >= 0).all() and (high <= whole.shape).all():
            np.testing.assert_array_equal(values, whole[tuple(map(slice, low, high))], err_msg=name)
            return
    raise AssertionError(f"{name} has nothing at {offset}")
