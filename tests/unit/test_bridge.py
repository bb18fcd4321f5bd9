"""What a recipe of Megatron-Bridge may not hold beside the mix is refused by its name."""

from types import SimpleNamespace

import pytest

from megatron_dynmix.bridge import _check
from megatron_dynmix.errors import InputError


def config():
    return SimpleNamespace(
        train=SimpleNamespace(train_iters=10, decrease_batch_size_if_needed=False),
        checkpoint=SimpleNamespace(custom_manager_class=None, non_persistent_ckpt_type=None),
        dataset=SimpleNamespace(enable_in_batch_packing=False, enable_offline_packing=False),
        dist=SimpleNamespace(use_decentralized_pg=False),
        model=SimpleNamespace(cuda_graph_impl="none"),
        validation=SimpleNamespace(eval_iters=0),
    )


def test_a_plain_recipe_passes():
    _check(config(), None)
    with_evaluation = config()
    with_evaluation.validation.eval_iters = 5
    _check(with_evaluation, lambda context: iter(()))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.train_iters", None),
        ("train.decrease_batch_size_if_needed", True),
        ("checkpoint.custom_manager_class", "mine.Manager"),
        ("checkpoint.non_persistent_ckpt_type", "local"),
        ("dataset.enable_in_batch_packing", True),
        ("dataset.enable_offline_packing", True),
        ("dist.use_decentralized_pg", True),
        ("model.cuda_graph_impl", "transformer_engine"),
        ("validation.eval_iters", 5),
    ],
)
def test_what_leaves_no_place_is_refused(setting, value):
    part, name = setting.split(".")
    given = config()
    setattr(getattr(given, part), name, value)
    with pytest.raises(InputError, match=setting):
        _check(given, None)
