"""`report`: what stands on the page of a run, and on that of several."""

import base64
import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import orjson
import pytest
from report_fixtures import NAMES, change, line_of, write_run

from megatron_dynmix.cli import main
from megatron_dynmix.mixing.strategy import RemarkKind
from megatron_dynmix.report.charts import charts_of
from megatron_dynmix.report.figures import COLOURS, OTHERS, TOP, Palette
from megatron_dynmix.report.pages import distinct_names, importance, page_of_run, page_of_runs
from megatron_dynmix.report.run import MOST_POINTS, Frame, quantised, read_run, thinned
from megatron_dynmix.report.summary import summary, warnings

CHARTS = [
    *("weights", "loss", "delta", "gate-load", "distance", "tokens", "epochs"),
    *("entropy", "kl-step", "imbalance", "load-cv-squared", "specialization", "throughput", "cost"),
]
MANY = tuple(f"source_{number:02}" for number in range(64))


def page_of(run_dir: Path) -> str:
    assert main(["report", str(run_dir)]) == 0
    return (run_dir / "report.html").read_text()


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def floats(array: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["bdata"]), dtype=array["dtype"])


def charts(run_dir: Path) -> dict:
    run = read_run(run_dir)
    found, axes = charts_of(run, Palette.of(run.sources, importance(run)))
    return {chart.id: chart for chart in found} | {"axes": axes}


def test_a_page_has_every_chart_and_needs_no_other_file(tmp_path, capsys):
    page = page_of(write_run(tmp_path / "mine"))
    assert list(data_of(page)["charts"]) == CHARTS
    for name in CHARTS:
        assert f'data-chart="{name}"' in page and f'href="#{name}"' in page
    own = page.replace(re.search(r"<script>/\*\*.*?</script>", page, re.DOTALL).group(0), "")
    assert len(own) < 200_000, "the library was found and taken off"
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", own)
    assert "default-src 'none'" in page
    assert "report.html" in capsys.readouterr().out


def test_curves_hold_the_recorded_numbers(tmp_path):
    run_dir = write_run(tmp_path / "mine")
    records = [orjson.loads(line) for line in (run_dir / "mixing.jsonl").read_bytes().splitlines()]
    data = data_of(page_of(run_dir))
    assert data["axes"]["updates"] == [record["iteration"] for record in records]
    assert data["axes"]["weights"] == [0, *data["axes"]["updates"]]
    traces = {trace["name"]: trace for trace in data["charts"]["delta"]["data"]}
    for place, name in enumerate(NAMES):
        np.testing.assert_allclose(
            floats(traces[name]["y"]), [record["delta"][place] for record in records], rtol=1e-6
        )
        assert traces[name]["meta"] == "updates" and "x" not in traces[name]
    weights = {trace["name"]: floats(trace["y"]) for trace in data["charts"]["weights"]["data"]}
    assert weights["chat"][0] == 0.25
    assert weights["chat"][-1] == pytest.approx(records[-1]["new_weights"][0], rel=1e-6)


def test_sixty_four_sources_have_few_colours_and_lose_no_weight(tmp_path):
    found = charts(write_run(tmp_path / "mine", sources=MANY, updates=3))
    bands = found["weights"].figure.data
    assert len(bands) == TOP + 1 and bands[-1].name == f"{64 - TOP} others"
    np.testing.assert_allclose(sum(np.asarray(band.y) for band in bands), 1, atol=1e-6)
    assert len(found["delta"].figure.data) == 64
    assert len(found["tokens"].figure.data[0].y) == 20 and "20 largest of 64" in found["tokens"].thinned
    *_, (box, traces) = found["delta"].legend.items()
    assert (box, len(traces)) == ((f"{64 - TOP} others", OTHERS), 64 - TOP)
    switched = sorted(trace for traces in found["loss"].legend.values() for trace in traces)
    assert switched == list(range(65)), "every curve can be switched off, each by one box"


def luminance(colour: str) -> float:
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def theme(selector: str) -> dict[str, str]:
    css = (Path(__file__).parents[2] / "megatron_dynmix/report/page.css").read_text()
    block = re.search(re.escape(selector) + r" \{(.*?)\}", css, re.DOTALL).group(1)
    return dict(re.findall(r"--([a-z-]+): (#\w{6})", block))


@pytest.mark.parametrize("selector", [":root", ':root[data-theme="dark"]'])
def test_colours_can_be_told_from_the_page(selector):
    colours = theme(selector)
    for curve in (*COLOURS, OTHERS):
        assert contrast(curve, colours["page"]) >= 3, curve  # WCAG 2.1, 1.4.11
    for text in ("ink", "note", "link"):
        for ground in ("page", "box", "alarm"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)  # 1.4.3


def test_long_runs_are_thinned_and_say_so(tmp_path):
    run_dir = write_run(tmp_path / "mine", updates=MOST_POINTS + 50, sources=NAMES[:2], experts=4)
    data = data_of(page_of(run_dir))
    updates = data["axes"]["updates"]
    assert len(updates) == MOST_POINTS and updates[0] == 10 and updates[-1] == 10 * (MOST_POINTS + 50)
    frames = data["charts"]["gate-load"]["frames"]
    assert len(frames["iterations"]) <= 60 and frames["iterations"][-1] == updates[-1]
    assert f"{MOST_POINTS} of {MOST_POINTS + 50} updates are drawn" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(("length", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (1000, 7)])
def test_thinned_keeps_both_ends_and_the_order(length, most):
    places = thinned(length, most)
    assert len(places) == min(length, most) and sorted(set(places)) == places
    if length:
        assert places[0] == 0 and places[-1] == length - 1


def test_heat_maps_are_kept_to_half_a_step():
    rng = np.random.default_rng(0)
    frames = [Frame(number, ("a", "b"), rng.random((2, 5))) for number in range(3)]
    found = quantised(frames)
    values = np.frombuffer(base64.b64decode(found["bytes"]), np.uint8).reshape(found["shape"])
    wanted = np.stack([frame.values_RC for frame in frames])
    np.testing.assert_allclose(values / 255 * found["most"], wanted, atol=found["most"] / 510 + 1e-12)


def test_colours_are_those_of_the_second_half_of_a_run():
    frames = [Frame(number, ("a",), np.full((1, 2), 9.0 if number == 0 else 0.5)) for number in range(4)]
    found = quantised(frames)
    assert found["most"] == 9 and found["coloured_most"] == 0.5


def test_heat_maps_of_other_sources_are_left_out_and_counted():
    frames = [Frame(1, ("a",), np.ones((1, 2))), Frame(2, ("a", "b"), np.ones((2, 2)))]
    found = quantised(frames)
    assert found["iterations"] == [2] and found["left_out"] == 1


def test_many_layers_are_shown_by_their_mean(tmp_path):
    run_dir = write_run(tmp_path / "mine", updates=2)
    load_DLE = np.random.default_rng(0).random((4, 40, 8))
    change(run_dir / "mixing.jsonl", 1, load=load_DLE)
    run = read_run(run_dir)
    np.testing.assert_allclose(run.load_frames[-1].values_RC, load_DLE.mean(axis=1))
    assert run.load_axis == "expert (mean of 40 layers)"


def test_a_strategy_that_keeps_its_weights_is_no_reason_for_alarm(tmp_path):
    run_dir = write_run(tmp_path / "mine", updates=3)
    (run_dir / "mixing.jsonl").write_bytes(b"")
    assert "mixing.jsonl is empty" in read_run(run_dir).missing, "the ledger knows of updates"
    stages = (run_dir / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "ledger.jsonl").write_bytes(stages[0])
    run = read_run(run_dir)
    assert run.missing == [] and warnings(run) == []
    assert "strategy gate-load, which keeps the weights that it begins with" in summary(run, run.written)[0]


def test_the_summary_names_who_won_who_is_redundant_and_why(tmp_path):
    run = read_run(write_run(tmp_path / "mine", updates=12))
    said = " ".join(summary(run, now=run.written))
    assert "4 sources; model tiny; strategy gate-load, updated every 10 iterations" in said
    assert "It is finished: 120 iterations" in said
    assert "Weight went most to chat, from 25.0%" in said and "the highest" in said
    assert "math and math_again load the experts most alike" in said
    assert "fell from 6.000 to 2.333" in said


@pytest.mark.parametrize(("age", "said"), [(5, "may still be running"), (4000, "has stopped or was killed")])
def test_a_run_that_is_not_finished_is_said_to_be(tmp_path, age, said):
    run = read_run(write_run(tmp_path / "mine", train_iters=400))
    text = " ".join(summary(run, now=run.written + age))
    assert "at iteration 100 of 400 (25%)" in text and said in text


def test_a_mix_that_never_changed_is_called_that(tmp_path):
    run_dir = write_run(tmp_path / "mine")
    (run_dir / "mixing.jsonl").write_text("")
    stages = (run_dir / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "ledger.jsonl").write_bytes(stages[0])
    run = read_run(run_dir)
    assert "The mix did not change" in " ".join(summary(run, now=run.written))
    assert [chart for chart in charts(run_dir) if chart == "weights"]


def test_what_to_look_at_is_said(tmp_path):
    run_dir = write_run(tmp_path / "mine")
    change(
        run_dir / "mixing.jsonl",
        9,
        new_weights=[0.985, 0.005, 0.005, 0.005],
        epochs=[9.0, 1.0, 1.0, 1.0],
        delta=[0.1, 0.1, 0.1, 0.11],
        delta_error=[0.01] * 4,
        expert_use={"busiest": [1.0, 8.0], "cv_squared": [0.0, 8.0], "specialization": None},
        notes=[{"kind": "override_unusable", "text": "weights kept: override.json cannot be used"}],
        seconds={"signal": 50.0},
    )
    (run_dir / "ledger.jsonl").unlink()
    said = " ".join(warnings(read_run(run_dir)))
    for part in (
        "collapsed",
        "Hardly drawn",
        "Drawn more than 4 times",
        "is noise",
        "8.0 times",
        "Mixing takes",
    ):
        assert part in said, part
    assert "Faults: 1, the last at iteration 100: weights kept" in said


@pytest.mark.parametrize(("even", "odd", "alarms"), [(0.4, 0.2, 1), (0.26, 0.25, 1), (0.25, 0.25, 0)])
def test_weights_that_go_to_and_fro_are_pointed_out(tmp_path, even, odd, alarms):
    run_dir = write_run(tmp_path / "mine")
    stages = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    for number, stage in enumerate(stages):
        share = even if number % 2 else odd
        stage["weights"] = [share, *[(1 - share) / 3] * 3]
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps(stage) + "\n" for stage in stages))
    assert sum("to and fro" in sentence for sentence in warnings(read_run(run_dir))) == alarms


@pytest.mark.parametrize("kind", get_args(RemarkKind))
def test_of_all_notes_only_an_override_that_cannot_be_used_is_a_fault(tmp_path, kind):
    run_dir = write_run(tmp_path / "mine", updates=1, interval=100)
    note = {"kind": kind, "text": "weights kept: no tokens measured yet from c"}
    change(run_dir / "mixing.jsonl", 0, notes=[note])
    run = read_run(run_dir)
    assert [entry.text for entry in run.events] == [note["text"]]
    faults = [sentence for sentence in warnings(run) if sentence.startswith("Faults: 1")]
    assert bool(faults) == (kind == "override_unusable")


def test_loads_of_several_layers_are_read_from_their_file_and_missed_if_it_is_gone(tmp_path):
    load_DLE = np.random.default_rng(0).random((4, 3, 8))
    run_dir = write_run(tmp_path / "mine", updates=2, load=load_DLE)
    run = read_run(run_dir)
    assert run.missing == [] and run.load_axis == "expert (3 layers side by side)"
    np.testing.assert_array_equal(run.load_frames[-1].values_RC, load_DLE.reshape(4, -1))
    (run_dir / "signals.bin").unlink()
    run = read_run(run_dir)
    assert run.load_frames == [] and len(run.updates) == len(run.distance_frames) == 2
    [said] = run.missing
    assert said.startswith("signals.bin: the signal of iteration 10 is lost") and "1 more update" in said


def test_a_sound_run_has_nothing_to_look_at(tmp_path):
    run_dir = write_run(tmp_path / "mine", interval=100)
    assert warnings(read_run(run_dir)) == []


def test_events_are_listed_with_their_kind(tmp_path):
    run_dir = write_run(tmp_path / "mine")
    change(run_dir / "mixing.jsonl", 0, events=[{"kind": "floor", "text": "floor: math raised to 0.1"}])
    change(
        run_dir / "mixing.jsonl",
        1,
        events=[{"kind": "override", "text": "override: code paused"}],
        notes=[{"kind": "last_known", "text": "last known counts used: code"}],
    )
    change(run_dir / "metrics.jsonl", 4, skipped_iterations=2)
    changed = {"kind": "stage", "why": "sources changed", "iteration": 61, "changes": ["code: gone"]}
    with (run_dir / "ledger.jsonl").open("ab") as file:
        file.write(line_of(changed | {"sources": NAMES, "weights": [0.25] * 4}))
    lifecycle = [
        {"iteration": 0, "event": "start", "time": "2026-01-01T02:03:04+00:00"},
        {"iteration": 70, "event": "resume", "notes": ["lr: 1 -> 2"]},
        {"iteration": 100, "event": "finished"},
    ]
    (run_dir / "events.jsonl").write_bytes(b"".join(map(line_of, lifecycle)))
    found = [(event.iteration, event.kind) for event in read_run(run_dir).events]
    assert found == [
        *((0, "start"), (10, "guardrail"), (20, "override"), (20, "note"), (50, "fault")),
        *((61, "sources"), (70, "resume"), (70, "fault"), (100, "finished")),
    ]
    page = page_of(run_dir)
    assert "2026-01-01 02:03:04 UTC" in page and "ended without a word" in page and "lr: 1 -&gt; 2" in page
    marks = data_of(page)["charts"]["weights"]["layout"]["shapes"]
    assert [shape["x0"] for shape in marks] == [20, 50, 61, 70]


def test_names_cannot_put_anything_into_the_page(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    page = page_of(write_run(tmp_path / "mine", sources=(evil, "b", "c")))
    assert "<img" not in re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)
    assert data_of(page)["charts"]["delta"]["data"][0]["name"] == evil


def test_runs_are_set_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dirs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b", "c"))]
    assert main(["report", *map(str, run_dirs)]) == 0
    page = (tmp_path / "report.html").read_text()
    drawn = data_of(page)["charts"]
    assert [trace["name"] for trace in drawn["loss"]["data"]] == ["a", "b", "c"]
    assert len(drawn["end-weights-chart"]["data"]) == 3
    assert {trace["meta"] for trace in drawn["loss"]["data"]} == {"loss-0"}, "equal axes are held once"
    assert "3 runs compared" in page and "compare held-out losses" in page


def test_runs_of_other_sources_compare(tmp_path):
    runs = [read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", sources=("chat", "law")))]
    page = page_of_runs(runs, now=0.0)
    weights = page.tables["end-weights"]
    assert [row[0] for row in weights.rows] == [*NAMES, "law"]
    assert dict((row[0], row[1:]) for row in weights.rows)["law"][0] == "–"


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    runs = [read_run(write_run(tmp_path / name / "seed-1", updates=1)) for name in ("uniform", "gate-load")]
    assert distinct_names(runs) == ["uniform/seed-1", "gate-load/seed-1"]


def test_the_numbers_can_be_read_without_the_charts(tmp_path):
    run = read_run(write_run(tmp_path / "mine", updates=3))
    page = page_of_run(run, now=run.written)
    sources = page.tables["sources"]
    chat = dict(zip(sources.header, sources.rows[0], strict=True))
    assert chat["source"] == "chat" and chat["first weight"] == "0.250" and chat["tokens"] == "3,000"
    assert chat["share of tokens"] == "25.0%" and chat["epochs"] == "0.30"
    with_numbers = {chart.id for chart in page.charts if chart.table}
    assert with_numbers == {"distance", *CHARTS[7:]}
