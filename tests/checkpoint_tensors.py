"""What a checkpoint holds, tensor by tensor: equal runs may write their tensors in another order."""

import torch


def tensors_of(folder):
    """Every tensor of a distributed checkpoint, by its dotted name."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    tree = {}
    _load_state_dict(tree, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return dict(_flat(tree))


def _flat(tree, before=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        elif torch.is_tensor(value):
            yield before + name, value


def assert_equal_tensors(a, b):
    """To the bit."""
    assert a and a.keys() == b.keys()
    assert not [name for name in a if _content(a[name]) != _content(b[name])]


def _content(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
