"""The numbers of an evaluation from sums over the held-out rows."""

import math

import pytest
import torch
from config_fixtures import good_settings, load

from megatron_dynmix import platform
from megatron_dynmix.errors import CommandFailed, InputError

platform.start()
from megatron_dynmix.data.source_stats import SourceStats  # noqa: E402
from megatron_dynmix.training.evaluate import Evaluation, summarise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")


def summary(tmp_path, *loss_sums):
    config = load(tmp_path, good_settings(tmp_path))
    trained_D = torch.tensor([10.0, 20.0, 0.0], dtype=torch.float64)
    stats = SourceStats(torch.tensor(loss_sums, dtype=torch.float64), trained_D, trained_D)
    return summarise(config, stats, 7)


def test_a_source_without_trained_tokens_is_in_no_mean(tmp_path):
    found = summary(tmp_path, 10.0, 60.0, 0.0)
    assert found.sources["code"] is None and found.mean_loss == 2.0
    assert (found.worst_source, found.worst_loss) == ("math", 3.0)
    assert found.token_loss == pytest.approx(70 / 30)
    assert found.sources["chat"].perplexity == pytest.approx(math.e)


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    found = summary(tmp_path, 10.0, 60.0, 0.0)
    found.write(tmp_path)
    assert Evaluation.read(tmp_path) == found and found.iteration == 7


@pytest.mark.parametrize("content", [None, '{"iteration": 7, "sou', "[]", '{"iteration": 7, "sources": {}}'])
def test_half_an_evaluation_is_none(tmp_path, content):
    if content is not None:
        Evaluation.path(tmp_path).write_text(content)
    assert Evaluation.read(tmp_path) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e5])
def test_a_model_that_has_diverged_is_said_by_source(tmp_path, bad):
    with pytest.raises(CommandFailed, match=r"held-out loss of source math is .*: the model has diverged"):
        summary(tmp_path, 10.0, bad, 0.0)


def test_answers_are_no_setting_of_a_source(tmp_path):
    content = good_settings(tmp_path)
    content["data"]["sources"]["math"]["answer"] = "#### (.+)"
    with pytest.raises(InputError, match=r"data\.sources\.math.*answer"):
        load(tmp_path, content)
