"""When a checkpoint is written for Hugging Face too, and what a failure does to the run."""

from unittest.mock import Mock

import pytest
import torch
from config_fixtures import good_settings, load

from megatron_dynmix import platform
from megatron_dynmix.errors import TrainingStopped

platform.start()
from megatron_dynmix.convert import export_hf  # noqa: E402
from megatron_dynmix.job.agreement import RankFailure  # noqa: E402
from megatron_dynmix.training import saving  # noqa: E402


def settled(tmp_path, monkeypatch, *, iteration, flags, export):
    """What is said when the checkpoint of an iteration is whole, of a run of 20."""
    monkeypatch.setattr(export_hf, "export", export)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    checkpointer = Mock(directory=tmp_path / "checkpoints", newest=None, good=None, lease=None)
    monkeypatch.setattr(saving, "first_failure", lambda failure: failure)
    checkpointer.finish.return_value = iteration
    said = []
    config = load(tmp_path, good_settings(tmp_path), flags)
    saving.Saving(config, checkpointer, said.append).settle(wait=True)
    return said


@pytest.mark.parametrize(
    ("flags", "iteration", "times"),
    [
        ([], 20, 0),
        (["--save-hf", "end"], 10, 0),
        (["--save-hf", "end"], 20, 1),
        (["--save-hf", "every"], 10, 1),
    ],
    ids=str,
)
def test_the_folder_is_written_when_it_is_asked_for(tmp_path, monkeypatch, flags, iteration, times):
    export = Mock()
    said = settled(tmp_path, monkeypatch, iteration=iteration, flags=flags, export=export)
    assert (
        export.call_count
        == times
        == sum("successfully saved " in line and "hugging_face" in line for line in said)
    )
    if times:
        name = f"iter_{iteration:07d}"
        export.assert_called_once_with(
            tmp_path / "checkpoints" / name, tmp_path / "hugging_face" / name, None
        )


def test_a_failure_ends_the_run_as_that_of_a_checkpoint_does(tmp_path, monkeypatch):
    failing = Mock(side_effect=RankFailure("rank 1: no room"))
    going_on = ["--save-hf", "every", "--on-save-error", "continue"]
    said = settled(tmp_path, monkeypatch, iteration=10, flags=going_on, export=failing)
    assert "could not be written: rank 1: no room" in said[-1]
    assert said[-1].endswith("the run goes on, as on_save_error is continue")
    for iteration, flags in ((20, going_on), (10, going_on[:2])):
        with pytest.raises(TrainingStopped, match=r"hugging_face.* could not be written: rank 1: no room"):
            settled(tmp_path, monkeypatch, iteration=iteration, flags=flags, export=failing)
