"""The learning rate of a run whose length and batch size change on the way."""

import itertools
from dataclasses import replace

import pytest
from config_fixtures import good_settings, load
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dynmix.config import RunConfig
from megatron_dynmix.config.batch_schedule import BatchSchedule, one_more
from megatron_dynmix.config.check import check_run
from megatron_dynmix.config.run_config import DataConfig, OptimizerConfig, TrainingConfig
from megatron_dynmix.errors import InputError
from megatron_dynmix.model.lr_schedule import build_scheduler, learning_rate, set_learning_rate

pytestmark = pytest.mark.filterwarnings("ignore:moe_ffn_hidden_size")

LR, MIN_LR = 1e-3, 1e-5
RAMP, STEPS = {"rampup_batch_size": (2, 2, 20)}, {"step_batch_size_schedule": "0:2 640:8 1280:4"}
WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3}


def run_config(batch_size=8, train_iters=8, warmup=2, training=(), **optimizer):
    size = {} if "step_batch_size_schedule" in dict(training) else {"global_batch_size": batch_size}
    return RunConfig(
        training=TrainingConfig(train_iters=train_iters, **size, **dict(training)),
        optimizer=OptimizerConfig(**{"lr": LR, "min_lr": MIN_LR, "lr_warmup_iters": warmup, **optimizer}),
        data=DataConfig(seq_length=64),
    )


def rates_of(*parts, done=()):
    """Learning rates before the first iteration and after each, of a run in parts: (config, until)."""
    rates, consumed = [], 0
    for config, until in parts:
        batches = replace(BatchSchedule.of(config), done=done)
        rates = rates or [learning_rate(config, batches, 0)]
        while len(rates) <= until:
            size = batches.batch_size(consumed)
            done, consumed = one_more(done, size), consumed + size
            rates.append(learning_rate(config, batches, consumed))
    return rates


def test_a_smaller_batch_does_not_end_the_decay_early():
    """Eight to four at iteration 4 of 8: at iteration 5, 36 of 48 samples are consumed, 16 warmed up."""
    parts = [(run_config(8, min_lr=0.0), 4), (run_config(4, min_lr=0.0), 8)]
    assert rates_of(*parts)[5] == pytest.approx(3.0866e-4, rel=1e-4)
    assert rates_of(*parts)[8] == 0.0
    assert all(rate > 0 for rate in rates_of(*parts)[1:8])


@pytest.mark.parametrize(
    "optimizer",
    [
        *({"lr_decay_style": style} for style in ("linear", "cosine")),
        *({**WSD, "lr_wsd_decay_style": fall} for fall in ("exponential", "linear", "cosine", "minus_sqrt")),
    ],
    ids=lambda optimizer: list(optimizer.values())[-1],
)
@pytest.mark.parametrize("before, after", [({}, RAMP), (RAMP, {}), (STEPS, {}), ({}, STEPS), (RAMP, STEPS)])
def test_the_last_iteration_has_min_lr_whatever_the_batches_were(optimizer, before, after):
    first, second = run_config(training=before, **optimizer), run_config(4, training=after, **optimizer)
    third = run_config(16, training=after, **optimizer)
    twice = [[(first, 2), (second, 7), (third, 8)]]
    for parts in [[(first, change), (second, 8)] for change in (1, 2, 4, 7)] + twice:
        rates = rates_of(*parts)
        assert rates[2] == LR and rates[8] == MIN_LR, parts
        assert all(later <= earlier for earlier, later in itertools.pairwise(rates[2:]))
        assert all(rate > MIN_LR for rate in rates[1:8])


@pytest.mark.parametrize("training", [{}, RAMP, STEPS])
def test_a_run_that_changes_nothing_has_the_rates_of_one_that_was_not_stopped(training):
    config = run_config(training=training)
    whole = rates_of((config, 8))
    for stop in range(1, 8):
        assert rates_of((config, stop), (config, 8)) == whole


@pytest.mark.parametrize("training", [{}, RAMP])
@pytest.mark.parametrize("style", ["linear", "cosine", "constant", "inverse-square-root"])
def test_rates_are_those_of_megatron_core_stepped_by_samples(training, style):
    config = run_config(training=training, lr_decay_style=style)
    batches = BatchSchedule.of(config)
    group = {}
    stepped = OptimizerParamScheduler(
        type("Optimizer", (), {"param_groups": [group]}), 0.0, LR, MIN_LR, batches.samples_after(2),
        batches.samples_after(8), style, 0.0, 0.0, batches.samples_after(8), "constant", False, True,
    )  # fmt: skip
    consumed = 0
    for rate in rates_of((config, 8)):
        assert group["lr"] == rate
        stepped.step(increment=batches.batch_size(consumed))
        consumed += batches.batch_size(consumed)


def test_more_iterations_stretch_the_decay_and_a_new_warm_up_holds():
    longer = rates_of((run_config(), 8), (run_config(train_iters=12), 12))
    assert longer[8] == MIN_LR < longer[9] and longer[12] == MIN_LR
    again = rates_of((run_config(), 4), (run_config(4, warmup=6), 8))
    assert again[5] == pytest.approx(LR * 36 / 40) and again[6] == LR and again[8] == MIN_LR


def test_a_decay_that_is_over_stays_over():
    rates = rates_of((run_config(lr_decay_iters=4), 5), (run_config(2, lr_decay_iters=4), 8))
    assert rates[3] > MIN_LR and rates[4:] == [MIN_LR] * 5


def test_the_fall_of_wsd_is_where_its_iterations_are():
    rates = rates_of((run_config(**WSD), 8))
    assert rates[2:6] == [LR] * 4 and rates[5] > rates[6] > rates[7] > rates[8] == MIN_LR
    in_samples = run_config(lr_decay_style="WSD", lr_wsd_decay_samples=24)
    assert rates_of((in_samples, 8)) == rates


def test_the_optimizer_is_given_the_rate_of_the_samples_consumed():
    """Also where a batch was skipped, and where a checkpoint says otherwise."""
    config, group = run_config(), {"lr": 0.0}
    batches = BatchSchedule.of(config)
    scheduler = build_scheduler(config, type("Optimizer", (), {"param_groups": [group]}), batches)
    scheduler.load_state_dict({**scheduler.state_dict(), "num_steps": 9})
    set_learning_rate(scheduler, 32)
    assert group["lr"] == rates_of((config, 8))[4]
    assert scheduler.state_dict()["num_steps"] == 32


@pytest.mark.parametrize(
    "optimizer, why",
    [
        ({"lr_decay_style": "WSD"}, "give either lr_wsd_decay_iters or lr_wsd_decay_samples"),
        ({**WSD, "lr_wsd_decay_samples": 8}, "give either lr_wsd_decay_iters or lr_wsd_decay_samples"),
        ({"lr_wsd_decay_iters": 3}, "lr_wsd_decay_iters is given, but lr_decay_style is cosine"),
        ({"lr_wsd_decay_samples": 3}, "lr_wsd_decay_samples is given, but"),
        ({"lr_wsd_decay_style": "linear"}, "lr_wsd_decay_style is given, but"),
        ({**WSD, "lr_wsd_decay_style": "WSD"}, "one of exponential, linear, cosine, minus_sqrt"),
        ({**WSD, "lr_wsd_decay_iters": 7}, "lr_wsd_decay_iters is 7, but only 6 are left"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_samples": 49}, "is 49, but only 48 are left"),
        ({**WSD, "lr_decay_iters": 4}, "is 3, but only 2 are left between the warm-up and iteration 4"),
    ],
)
def test_falls_that_cannot_be_are_refused(tmp_path, optimizer, why):
    content = good_settings(tmp_path)
    content["training"] |= {"train_iters": 8, "global_batch_size": 8}
    content["optimizer"] = {"lr_warmup_iters": 2, **optimizer}
    with pytest.raises(InputError, match=why):
        check_run(load(tmp_path, content), 2)
