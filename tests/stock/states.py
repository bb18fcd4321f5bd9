"""What a checkpoint of stock's holds, compared to the bit."""

from pathlib import Path

import torch


def state_of(checkpoints, iteration):
    """What a checkpoint holds: the mix, and every tensor by name."""
    from megatron.core.dist_checkpointing import load_common_state_dict
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    folder, tensors = Path(checkpoints) / f"iter_{iteration:07d}", {}
    _load_state_dict(tensors, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    args = load_common_state_dict(str(folder))["args"]
    return args.dynmix, dict(_flat(tensors))


def _flat(tree, before=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        elif torch.is_tensor(value):
            yield before + name, value


def assert_equal_states(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    differing = [name for name in a[1] if not torch.equal(a[1][name], b[1][name])]
    assert not differing
