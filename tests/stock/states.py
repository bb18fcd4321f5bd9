"""What a checkpoint of stock's holds, compared to the bit."""

from pathlib import Path

from tests.checkpoint_tensors import assert_equal_tensors, tensors_of


def state_of(checkpoints, iteration):
    """What a checkpoint holds: the mix, and every tensor by name."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    folder = Path(checkpoints) / f"iter_{iteration:07d}"
    return load_common_state_dict(str(folder))["args"].dynmix, tensors_of(folder)


def assert_equal_states(a, b):
    assert a[0] == b[0]
    assert_equal_tensors(a[1], b[1])
