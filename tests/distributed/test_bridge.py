"""The mix in Megatron-Bridge's loop: a small one with its events, and its own source where that is."""

import ast
import os
from pathlib import Path

import pytest

from megatron_dynmix.verify.verify import verify
from tests.distributed import bridge_programs, loop_programs
from tests.distributed.layouts import ep
from tests.distributed.ranks import run_ranks
from tests.distributed.test_mixed_run import FLAGS
from tests.stock import data

ONE = [*FLAGS, *ep(1)]
BRIDGE = os.environ.get("DYNMIX_MEGATRON_BRIDGE")
MASK = "skip_getting_attention_mask_from_dataset"


def test_the_run_is_that_of_our_own_trainer_though_a_step_was_undone(run_yaml, tmp_path):
    own = run_ranks(1, loop_programs.trained, run_yaml, ONE, tmp_path / "own")[0]
    theirs = run_ranks(1, bridge_programs.pretrain, run_yaml, ONE, tmp_path / "theirs", undone=(2, 3))[0]
    assert theirs == own


def test_skipped_iterations_and_a_stop_keep_what_is_drawn(run_yaml, tmp_path):
    own = run_ranks(1, loop_programs.trained, run_yaml, ONE, tmp_path / "own")[0]
    skipped = run_ranks(1, bridge_programs.pretrain, run_yaml, ONE, tmp_path / "skipped", skip=(1, 4))[0]
    assert skipped["mixing"][0]["rows"] == own["mixing"][0]["rows"]
    assert [update["iteration"] for update in skipped["mixing"]] == [2, 4]
    run_ranks(1, bridge_programs.pretrain_twice, run_yaml, ONE, tmp_path / "stopped", 3)
    for name in ("skipped", "stopped"):
        assert verify(tmp_path / name).proven


def test_the_example_mixes_its_sources(run_yaml, tmp_path):
    prefixes = data.write_sources(tmp_path)
    told = run_ranks(1, bridge_programs.run_example, run_yaml, ONE, tmp_path, prefixes, 2)[0]
    assert [update["iteration"] for update in told["mixing"]] == [2, 4]
    assert all(update["sources"] == list(data.SOURCES) for update in told["mixing"])
    assert verify(tmp_path / "runs/bridge").proven


@pytest.mark.skipif(not BRIDGE, reason="DYNMIX_MEGATRON_BRIDGE names no unpacked wheel of megatron-bridge")
def test_what_is_used_of_megatron_bridge_is_there():
    def tree(path):
        return ast.parse((Path(BRIDGE) / "megatron/bridge" / path).read_text())

    def names(path, kind):
        return {node.name: node for node in ast.walk(tree(path)) if isinstance(node, kind)}

    callbacks = names("training/callbacks.py", ast.FunctionDef)
    assert {"on_train_step_start", "on_train_step_end", "on_train_end"} <= callbacks.keys()
    assert "DatasetProvider" in names("data/base.py", ast.ClassDef)
    fields = {node.target.id for node in ast.walk(tree("data/base.py")) if isinstance(node, ast.AnnAssign)}
    from megatron_dynmix.bridge import MixedCheckpointManager, MixedProvider

    mine = set(MixedProvider.__dataclass_fields__) - {"seq_length", "done", MASK}
    assert mine <= fields
    assert MASK in (Path(BRIDGE) / "megatron/bridge/training/gpt_step.py").read_text()
    assert "register_allowed_target_prefix" in names("utils/instantiate_utils.py", ast.FunctionDef)
    helpers = names("training/utils/checkpoint_utils.py", ast.FunctionDef)
    assert {"get_checkpoint_name", "get_checkpoint_train_state_filename"} <= helpers.keys()
    manager = names("training/checkpointing.py", ast.ClassDef)["CheckpointManager"]
    for method in (node for node in manager.body if isinstance(node, ast.FunctionDef)):
        own = getattr(MixedCheckpointManager, method.name).__code__
        assert [argument.arg for argument in method.args.args] == list(own.co_varnames[: own.co_argcount])
