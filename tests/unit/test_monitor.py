import io
import itertools
import json
import math
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from run_fixtures import training_record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dynmix.errors import InputError, TrainingStopped
from megatron_dynmix.mixing.expert_use import ExpertUse
from megatron_dynmix.mixing.strategy import Remark
from megatron_dynmix.records import logline
from megatron_dynmix.records.heatmap import MOST_NAMES, distance_image, gate_load_image
from megatron_dynmix.records.jsonl import JsonlWriter, read_lines, read_records
from megatron_dynmix.records.live_line import LiveLine
from megatron_dynmix.records.schema import Event, MixingUpdate, TrainingRecord
from megatron_dynmix.records.writer import MetricsWriter

SOURCES = ["chat", "math", "code"]
NOW = datetime(2025, 3, 4, 5, 6, 7, 89)


def record_of(iteration: int, **changes) -> TrainingRecord:
    return training_record(iteration, 32 * iteration, **changes)


def mixing_update(iteration: int, **changes) -> MixingUpdate:
    update = MixingUpdate(
        iteration=iteration,
        consumed_samples=32 * iteration,
        sources=SOURCES,
        old_weights=[0.5, 0.25, 0.25],
        new_weights=[0.25, 0.5, 0.25],
        delta=[0.1, 0.2, 0.3],
        load=np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]),
        distance=np.array([[0.0, 0.35, 0.7], [0.35, 0.0, 1.06], [0.7, 1.06, 0.0]]),
        tokens=[1000, 3000, 0],
        rows=[10, 30, 0],
        epochs=[0.5, 1.5, 0.0],
        entropy=1.0397207708,
        kl_step=0.25,
        seconds={"signal": 0.1, "reduce": 0.01, "update": 0.001, "rebuild": 0.02},
    )
    return replace(update, **changes)


def event_of(iteration: int, *notes: str) -> Event:
    return Event(
        iteration=iteration,
        event="start",
        time="2026-01-02T03:04:05",
        version="1",
        ranks=2,
        notes=list(notes),
    )


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run_dir).Scalars(tag)]


def resume(run_dir: Path, iteration: int) -> MetricsWriter:
    # TensorBoard orders event files by the whole second in their names; only a test shares one with its past
    time.sleep(1.01 - time.time() % 1)
    return MetricsWriter(run_dir, resume_iteration=iteration)


def texts(run_dir: Path) -> list[str]:
    return [tag for tag in events(run_dir).Tags()["tensors"] if tag != "custom_scalars__config__"]


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


# jsonl


def test_every_record_is_one_json_line_readable_at_once(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = JsonlWriter(path)
    for iteration in (1, 2):
        writer.write(event_of(iteration, "línea\n2"))
        assert read_lines(path, Event)[-1] == event_of(iteration, "línea\n2")
    writer.close()
    assert len(path.read_bytes().split(b"\n")) == 3


def test_non_finite_numbers_and_arrays_are_written_as_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(math.nan)}
    writer.write(record_of(1, source_loss=values, tokens={"a": np.int64(3)}))
    [record] = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert list(record["source_loss"].values()) == ["NaN", "Infinity", "-Infinity", "NaN"]
    assert record["tokens"] == {"a": 3}
    [back] = read_lines(path, TrainingRecord)
    assert list(back.source_loss.values())[1:3] == [math.inf, -math.inf]


@pytest.mark.parametrize(("keep_until", "kept"), [(0, 0), (4, 4), (10, 10), (99, 10), (None, 10)])
def test_opening_cuts_what_lies_after_the_kept_iteration_and_goes_on(tmp_path, keep_until, kept):
    path = tmp_path / "metrics.jsonl"
    first = JsonlWriter(path)
    for iteration in range(1, 11):
        first.write(event_of(iteration))
    first.close()
    second = JsonlWriter(path, keep_until=keep_until)
    second.write(event_of(kept + 1))
    assert [record["iteration"] for record in read_records(path)] == list(range(1, kept + 2))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep_until", [None, 2])
@pytest.mark.parametrize("tail", [b'{"iteration": 3, "lm_l', b"\x00\x00", b'{"iteration": 3}'])
def test_a_last_line_cut_short_is_taken_off_with_a_warning(tmp_path, caplog, tail, keep_until):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"iteration": 2}\n' + tail)
    writer = JsonlWriter(path, keep_until=keep_until)
    assert "metrics.jsonl:3: incomplete last line" in caplog.text
    writer.write(event_of(3))
    assert [record["iteration"] for record in read_records(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"step": 1}', '{"iteration": "1"}', ""])
def test_a_broken_line_before_the_last_is_named_and_the_file_left_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n' + line + '\n{"iteration": 2}\n')
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: "):
        JsonlWriter(path, keep_until=1)
    assert path.read_bytes() == before


# log lines


def test_training_line_has_megatron_lms_shape():
    line = logline.training_line(record_of(5), 100, NOW)
    assert line == (
        " [2025-03-04 05:06:07.000089] iteration        5/     100 | consumed samples:          160 |"
        " elapsed time per iteration (ms): 500.0 | learning rate: 3.000000E-03 | global batch size:    32 |"
        " lm loss: 2.500000E+00 | load_balancing_loss: 1.010000E+00 | loss scale: 1.0 | grad norm: 1.250 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 |"
        " tokens per second: 8192.0 | useful token share: 0.750 |"
    )


def test_source_loss_line_marks_a_source_that_was_not_drawn():
    assert logline.source_loss_line(record_of(5)) == (
        " lm loss per source at iteration        5 | chat: 2.000000E+00 | math: 3.000000E+00 | code: - |"
    )


def test_checkpoint_lines_have_megatron_lms_shape():
    folder, stamp = Path("run/checkpoints"), "[2025-03-04 05:06:07.000089]"
    assert logline.saving_line(50, folder, NOW) == (
        f"{stamp} saving checkpoint at iteration      50 to run/checkpoints in torch_dist format"
    )
    assert logline.saved_line(50, folder, NOW, tp_size=2, pp_size=4) == (
        f"{stamp} successfully saved checkpoint from iteration      50 to run/checkpoints [ t 1/2, p 1/4 ]"
    )
    assert logline.loading_line(50, folder) == (
        " loading distributed checkpoint from run/checkpoints at iteration 50"
    )
    assert logline.loaded_line(50, folder, tp_size=1, pp_size=1) == (
        "  successfully loaded checkpoint from run/checkpoints [ t 1/1, p 1/1 ] at iteration 50"
    )


def test_mixing_table_is_aligned_ascii():
    table = logline.mixing_table(mixing_update(10, notes=[Remark("floor", "floor held code at 0.25")]))
    assert table.splitlines() == [
        " weight update at iteration       10 | consumed samples:          320 |",
        "  source  old weight      new weight   change   delta  tokens  epochs",
        "  chat        0.5000  ->      0.2500  -0.2500  0.1000   1,000    0.50",
        "  math        0.2500  ->      0.5000  +0.2500  0.2000   3,000    1.50",
        "  code        0.2500  ->      0.2500  +0.0000  0.3000       0    0.00",
        "  note: floor held code at 0.25",
    ]


def test_mixing_table_tells_what_shadows_and_guardrails_do():
    update = mixing_update(
        10, shadow={"odm": [0.5, 0.25, 0.25]}, events=[Remark("override", "override: math paused")]
    )
    assert logline.mixing_table(update).splitlines()[-2:] == [
        "  shadow odm: chat 0.5000, math 0.2500, code 0.2500",
        "  event: override: math paused",
    ]


def test_mixing_table_of_a_strategy_without_delta():
    lines = logline.mixing_table(mixing_update(10, delta=None)).splitlines()
    assert len(lines) == 5
    assert lines[2].split() == ["chat", "0.5000", "->", "0.2500", "-0.2500", "-", "1,000", "0.50"]


# three hundred sources

MANY = [f"source_{number:03d}" for number in range(300)]


def many_sources_update():
    """Source 7 and source 250 move most."""
    old, share = np.full(300, 1 / 300), np.arange(300) * 1e-6
    share[[7, 250]] += [0.01, -0.003]
    return mixing_update(
        10,
        sources=MANY,
        old_weights=old.tolist(),
        new_weights=(old + share).tolist(),
        delta=[0.1] * 300,
        tokens=[10] * 300,
        epochs=[0.5] * 300,
        shadow={"odm": old.tolist()},
        events=[Remark("floor", f"floor raised {name}") for name in MANY],
        notes=[Remark("few_tokens", "fewer than min_tokens 1: " + ", ".join(MANY))],
    )


def test_of_very_many_sources_an_update_shows_the_top_movers():
    lines = logline.mixing_table(many_sources_update(), 20).splitlines()
    assert len(lines) == 2 + 20 + 1 + 1 + 20 + 1 + 1
    assert [line.split()[0] for line in lines[2:22]] == ["source_007", "source_250", *MANY[282:]]
    assert lines[22].strip() == lines[44].strip() == "... and 280 more (see --log-sources)"
    assert lines[23].endswith(", and 280 more") and max(map(len, lines)) < 800
    assert lines[-1].endswith(" ... (all of it in mixing.jsonl)")


def test_all_of_them_are_shown_on_request():
    table = logline.mixing_table(many_sources_update(), 300)
    assert all(f"  {name}  " in table for name in MANY) and "more" not in table
    assert table == logline.mixing_table(many_sources_update())
    few = mixing_update(10)
    assert logline.mixing_table(few, 20) == logline.mixing_table(few)


def test_of_very_many_sources_the_highest_losses_are_shown():
    losses = {name: None if number % 3 else float(number) for number, name in enumerate(MANY)}
    line = logline.source_loss_line(record_of(5, source_loss=losses), 2)
    few_drawn = {**dict.fromkeys(MANY), "source_001": 1.0}
    assert logline.source_loss_line(record_of(5, source_loss=few_drawn), 20).count("|") == 3
    assert line == (
        " lm loss per source at iteration        5 | source_294: 2.940000E+02 | source_297: 2.970000E+02 |"
        " the highest of 300 |"
    )
    assert logline.source_loss_line(record_of(5, source_loss=losses), 300).count("|") == 301


# heat maps and their numbers


def test_heat_maps_are_rgb_images_with_more_than_one_colour():
    update = mixing_update(10)
    for image in (
        gate_load_image(update.load, SOURCES),
        gate_load_image(np.full((3, 2, 4), 0.25) + np.eye(3, 8).reshape(3, 2, 4), SOURCES),
        distance_image(update.distance, ["$a$", "b_1", "ç"]),
    ):
        assert image.dtype == np.uint8
        assert image.ndim == 3 and image.shape[2] == 3
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_a_heat_map_of_many_sources_and_experts_stays_of_bounded_size():
    many = [f"source {i}" for i in range(5 * MOST_NAMES)]
    load_DE = np.random.default_rng(0).random((len(many), 256))
    assert max(gate_load_image(load_DE, many).shape) <= 1400


# the run's folder


@pytest.fixture
def run_dir(tmp_path):
    writer = MetricsWriter(tmp_path, resume_iteration=None)
    writer.text("config", "| key | value |\n|---|---|\n| lr | 3e-3 |")
    for iteration in (5, 10, 15):
        writer.training(record_of(iteration))
    writer.mixing(mixing_update(10))
    writer.mixing(mixing_update(15))
    writer.close()
    return tmp_path


def test_metrics_and_mixing_records_are_kept_whole(run_dir):
    assert read_lines(run_dir / "metrics.jsonl", TrainingRecord) == [record_of(i) for i in (5, 10, 15)]
    updates = read_lines(run_dir / "mixing.jsonl", MixingUpdate)
    assert [update.to_json() for update in updates] == [mixing_update(i).to_json() for i in (10, 15)]


def test_training_scalars_carry_megatron_lms_tags(run_dir):
    expected = {
        "lm loss": 2.5,
        "load_balancing_loss": 1.01,
        "learning-rate": 3.0e-3,
        "batch-size": 32,
        "grad-norm": 1.25,
        "iteration-time": 0.5,
        "tokens-per-second": 8192,
        "useful-token-share": 0.75,
        "dynmix/lm-loss/chat": 2.0,
        "dynmix/lm-loss/math": 3.0,
    }
    for tag, value in expected.items():
        assert scalars(run_dir, tag) == [(i, pytest.approx(value)) for i in (5, 10, 15)]
    assert scalars(run_dir, "lm loss vs samples") == [(160, 2.5), (320, 2.5), (480, 2.5)]
    assert "dynmix/lm-loss/code" not in events(run_dir).Tags()["scalars"]


def test_mixing_scalars_and_images_lie_under_dynmix(run_dir):
    expected = {
        "dynmix/weight/math": 0.5,
        "dynmix/delta/code": 0.3,
        "dynmix/token-share/math": 0.75,
        "dynmix/epochs/chat": 0.5,
        "dynmix/entropy": 1.0397207708,
        "dynmix/kl-step": 0.25,
        "dynmix/seconds/signal": 0.1,
    }
    for tag, value in expected.items():
        assert scalars(run_dir, tag) == [(i, pytest.approx(value)) for i in (10, 15)]
    assert sorted(events(run_dir).Tags()["images"]) == ["dynmix/distance", "dynmix/gate-load"]
    assert texts(run_dir) == ["config/text_summary"]


def test_an_update_without_signal_draws_nothing_but_weights(tmp_path):
    writer = MetricsWriter(tmp_path, resume_iteration=None)
    writer.mixing(
        mixing_update(
            10,
            delta=None,
            load=None,
            distance=None,
            tokens=[0, 0, 0],
            notes=[Remark("last_known", "no signal")],
        )
    )
    writer.mixing(mixing_update(20, delta=None, load=None, distance=None, probe_loss=[2.0, 3.0, 4.0]))
    writer.close()
    tags = events(tmp_path).Tags()
    assert tags["images"] == []
    assert not [tag for tag in tags["scalars"] if "delta" in tag]
    assert scalars(tmp_path, "dynmix/weight/chat") == [(10, 0.25), (20, 0.25)]
    assert scalars(tmp_path, "dynmix/token-share/chat") == [(20, 0.25)]
    assert scalars(tmp_path, "dynmix/probe-lm-loss/code") == [(20, 4.0)]


def test_errors_shadows_and_raisedare_drawn(tmp_path):
    writer = MetricsWriter(tmp_path, resume_iteration=None)
    shadow = {"loss-softmax:temperature=2": [0.2, 0.3, 0.5]}
    writer.mixing(
        mixing_update(
            10, delta_error=[0.01, 0.02, 0.03], shadow=shadow, events=[Remark("floor", "floor: code")]
        )
    )
    writer.close()
    assert scalars(tmp_path, "dynmix/delta-error/math") == [(10, pytest.approx(0.02))]
    assert scalars(tmp_path, "dynmix/shadow/loss-softmax:temperature=2/code") == [(10, 0.5)]
    assert texts(tmp_path) == ["dynmix/events/text_summary"]


def test_resuming_at_10_leaves_no_iteration_twice_and_none_lost(run_dir):
    writer = resume(run_dir, 10)
    writer.training(record_of(15, lm_loss=1.0))
    writer.mixing(mixing_update(15, new_weights=[0.2, 0.2, 0.6]))
    writer.close()
    assert [record["lm_loss"] for record in read_records(run_dir / "metrics.jsonl")] == [2.5, 2.5, 1.0]
    assert [update["iteration"] for update in read_records(run_dir / "mixing.jsonl")] == [10, 15]
    assert scalars(run_dir, "lm loss") == [(5, 2.5), (10, 2.5), (15, 1.0)]
    assert scalars(run_dir, "lm loss vs samples") == [(160, 2.5), (320, 2.5), (480, 1.0)]
    assert scalars(run_dir, "dynmix/weight/code") == [(10, 0.25), (15, pytest.approx(0.6))]


@pytest.mark.parametrize(
    "sizes, resumes",
    [((1,), (6,)), ((2, 3), (9, 4, 8)), ((1, 8), (4, 4)), ((8, 1), (2,)), ((1,), (-1, 5))],
    ids=str,
)
def test_no_point_over_samples_stands_twice_though_a_run_resumes(tmp_path, monkeypatch, sizes, resumes):
    """It trains to iteration 10 each time, then goes on from an earlier one; batches change their size."""
    consumed = [0, *itertools.accumulate(sizes[iteration % len(sizes)] for iteration in range(10))]
    real, writer = time.time, MetricsWriter(tmp_path, resume_iteration=None)
    for started, kept in enumerate((*resumes, None)):
        first = max(resumes[started - 1], 0) if started else 0
        for iteration in range(first + 1, 11):
            writer.training(training_record(iteration, consumed[iteration], lm_loss=float(started)))
        writer.close()
        if kept is not None:  # event files are ordered by the second in their names
            monkeypatch.setattr(time, "time", lambda later=2 * started + 2: real() + later)
            writer = MetricsWriter(tmp_path, resume_iteration=kept)
    for tag, steps in {"lm loss": range(1, 11), "lm loss vs samples": consumed[1:]}.items():
        points = scalars(tmp_path, tag)
        assert [step for step, _ in points] == list(steps), tag
        assert [loss for _, loss in points] == [
            record["lm_loss"] for record in read_records(tmp_path / "metrics.jsonl")
        ]


def test_names_of_any_script_are_tags_and_line_up(tmp_path):
    names = ["数学", "код", "हिन्दी"]
    update = mixing_update(10, sources=names)
    writer = MetricsWriter(tmp_path, resume_iteration=None)
    writer.mixing(update)
    writer.close()
    weights = [events(tmp_path).Scalars(f"dynmix/weight/{name}")[0].value for name in names]
    assert weights == update.new_weights
    assert set(events(tmp_path).Tags()["images"]) == {"dynmix/gate-load", "dynmix/distance"}
    rows = logline.mixing_table(update).splitlines()[2:5]
    # an ideograph takes two columns of a terminal, the sign that silences a vowel none
    column = rows[1].index("->")
    assert [row.index("->") - column for row in rows] == [-2, 0, 1]


def test_a_new_run_does_not_write_behind_another(run_dir):
    with pytest.raises(InputError, match="holds the records of another run"):
        MetricsWriter(run_dir, resume_iteration=None)


def test_beginning_again_at_0_takes_off_everything(run_dir):
    MetricsWriter(run_dir, resume_iteration=0).close()
    assert read_records(run_dir / "metrics.jsonl") == read_records(run_dir / "mixing.jsonl") == []


def test_a_diverged_loss_is_recorded_not_fatal(tmp_path):
    writer = MetricsWriter(tmp_path, resume_iteration=None)
    writer.training(record_of(5, lm_loss=math.nan, grad_norm=math.inf))
    writer.close()
    [record] = read_records(tmp_path / "metrics.jsonl")
    assert (record["lm_loss"], record["grad_norm"]) == ("NaN", "Infinity")
    # resuming plots the kept records again: their strings have to be read back as numbers
    resume(tmp_path, 5).close()
    [(step, loss)] = scalars(tmp_path, "lm loss vs samples")
    assert step == 160 and math.isnan(loss)


def test_a_full_disk_stops_the_run_and_names_the_file(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer._file = open("/dev/full", "wb")  # noqa: SIM115
    for write in (lambda: writer.write(event_of(1)), writer.flush, writer.close):
        with pytest.raises(TrainingStopped, match=r"metrics.jsonl cannot be written \(No space left on dev"):
            write()


# dashboards


def test_charts_with_several_tags_and_the_settings_are_told(tmp_path):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    writer = MetricsWriter(tmp_path, resume_iteration=None)
    writer.settings({"optimizer.lr": 1e-3, "training.bf16": True, "mixing.strategy": "gate-load"})
    use = ExpertUse(busiest=[1.5, 2.25], cv_squared=[0.25, 0.5], specialization=[0.125, 0.0])
    writer.mixing(mixing_update(10, expert_use=use))
    writer.close()
    found = events(tmp_path)
    told = Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in told.category[0].chart}
    assert charts["weights"] == ["dynmix/weight/.*"] and "loss of each source" in charts
    assert "_hparams_/session_start_info" in found.summary_metadata
    assert scalars(tmp_path, "dynmix/expert-load/layer-1") == [(10, 2.25)]
    assert scalars(tmp_path, "dynmix/load-cv-squared/layer-1") == [(10, 0.5)]
    assert scalars(tmp_path, "dynmix/specialization/layer-0") == [(10, 0.125)]


class FakeWandb:
    """What is used of the client of Weights & Biases, and what it was told."""

    def __init__(self):
        self.given, self.logged, self.finished = [], [], 0
        self.config = SimpleNamespace(update=lambda settings, allow_val_change: self.logged.append(settings))
        self.summary, self.id = {}, "abc123"

    def init(self, **given):
        self.given.append(given)
        return self

    def define_metric(self, *names, **options):
        pass

    def log(self, values):
        self.logged.append(values)
        self.summary["iteration"] = values["iteration"]

    def finish(self):
        self.finished += 1

    @staticmethod
    def Image(pixels):
        return pixels.shape


def test_weights_and_biases_gets_the_same_numbers_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    client = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", client)
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    for resume_iteration in (None, 10):
        writer = MetricsWriter(
            run_dir, resume_iteration=resume_iteration, wandb_project="mixes", wandb_exp_name=None
        )
        writer.training(record_of(20))
        writer.mixing(mixing_update(20))
        if resume_iteration is not None:
            writer.training(record_of(30))
        writer.close()
    assert [values["iteration"] for values in client.logged] == [20, 20, 30]  # nothing twice
    assert [(given["name"], given["id"]) for given in client.given] == [("mine", None), ("mine", "abc123")]
    training, mixing = client.logged[:2]
    assert training["iteration"] == 20 and training["lm loss"] == 2.5
    assert "dynmix/lm-loss/code" not in training  # it was not drawn
    assert mixing["dynmix/weight/math"] == 0.5 and mixing["dynmix/gate-load"][2] == 3
    assert client.finished == 2
    tags = set(events(run_dir).Tags()["scalars"])
    assert {tag for tag in (training | mixing) if tag not in ("iteration",)} <= tags | {
        "dynmix/gate-load",
        "dynmix/distance",
    }


def test_weights_and_biases_that_cannot_be_reached_is_one_message(tmp_path, monkeypatch):
    def fail(**given):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail))
    with pytest.raises(InputError, match=r"mixes: no route to host; log in .*WANDB_MODE=offline"):
        MetricsWriter(tmp_path, resume_iteration=None, wandb_project="mixes")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_line_that_is_always_true(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    line = LiveLine(["a", "b", "c", "d", "e"], 10, 4, silent=False)
    monkeypatch.setattr(line._bar, "mininterval", 0)
    line.step(2.5, 8192.0, np.array([0.1, 0.5, 0.2, 0.15, 0.05]))
    line.say("a log line")
    line.close()
    shown = terminal.getvalue()
    assert "5/10" in shown and "loss 2.500 | 8,192 tokens/s | b 0.50 c 0.20 d 0.15 a 0.10 +1 more" in shown
    assert "a log line\n" in shown


def test_elsewhere_there_are_only_log_lines(capsys):
    for silent in (False, True):
        line = LiveLine(["a"], 10, 0, silent=silent)
        line.step(2.5, 8192.0, np.ones(1))
        line.say("a log line")
        line.close()
    assert capsys.readouterr().out == "a log line\n"
