"""The example in Megatron-Bridge's own loop: what it draws, records, saves and goes on from."""

import shutil

import numpy as np
import pytest
import torch

from megatron_dynmix.verify.verify import verify
from tests.bridge import programs
from tests.distributed.ranks import run_ranks
from tests.stock import data

pytestmark = pytest.mark.slow


@pytest.fixture
def train(prefixes, tmp_path):
    """Run the example in a folder: `train(ranks, name, **settings)`; return what was recorded."""

    def run(world_size, name, **how):
        log = tmp_path / f"{name}.log"
        ranks = run_ranks(world_size, programs.train, tmp_path / name, prefixes, log=log, timeout=900, **how)
        for code, _ in ranks:
            assert not code, log.with_name(f"{log.name}.0").read_text()[-3000:]
        return ranks[0][1]

    return run


def saved(folder, **further):
    return {"checkpoint__save": str(folder), "checkpoint__save_interval": 3, **further}


def gone_on_from(folder, **further):
    """Begin after the third iteration, in the middle of an interval."""
    return {"checkpoint__load": str(folder), "checkpoint__ckpt_step": 3, **further}


@pytest.fixture
def whole(train, tmp_path):
    return train(1, "whole", **saved(tmp_path / "saved"))


def test_the_example_is_proven_and_its_stop_inside_an_interval_changes_nothing(whole, train, tmp_path):
    assert [update["iteration"] for update in whole["mixing"]] == [2, 4, 6]
    assert whole["mixing"][0]["sources"] == list(data.SOURCES)
    assert verify(tmp_path / "whole/runs/bridge").proven
    train(1, "stopped", **saved(tmp_path / "stopped_at", train__exit_interval=3))
    assert train(1, "stopped", **gone_on_from(tmp_path / "stopped_at")) == whole
    train(1, "plain", mixed=False, **gone_on_from(tmp_path / "saved"))  # which knows nothing of the mix


def test_it_goes_on_in_pipeline_stages(whole, train, tmp_path):
    shutil.copytree(tmp_path / "whole/runs", tmp_path / "stages/runs")
    stages = {"model__pipeline_model_parallel_size": 2, "model__pipeline_dtype": torch.float32}
    assert train(2, "stages", **gone_on_from(tmp_path / "saved", **stages)) == whole


def test_expert_parallel_ranks_draw_what_one_does(whole, train, tmp_path):
    """Their experts begin with other weights, so they are compared until the first update."""
    wider = train(2, "wider", model__expert_model_parallel_size=2)
    assert wider["samples"][:2] == whole["samples"][:2]
    first, told = wider["mixing"][0], whole["mixing"][0]
    assert (first["rows"], first["tokens"]) == (told["rows"], told["tokens"])
    counted, expected = (np.sum(update["counts"]["half_counts"], axis=(0, 2, 3)) for update in (first, told))
    assert counted.tolist() == expected.tolist()
    assert verify(tmp_path / "wider/runs/bridge").proven


def test_lora_on_the_router_is_counted_as_the_router_is(whole, train, tmp_path):
    """It begins as nothing, and at a learning rate of 0 it stays nothing."""
    given = {"checkpoint__pretrained_checkpoint": str(tmp_path / "saved")}
    given |= {"optimizer__lr": 0.0, "optimizer__min_lr": 0.0}
    tuned = train(1, "tuned", checkpoint__finetune=True, **given)
    assert any(np.any(update["counts"]["half_counts"]) for update in tuned["mixing"])
    assert train(1, "adapted", lora=["router"], **given) == tuned
