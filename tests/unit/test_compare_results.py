"""From the numbers of finished cells to tables and pages."""

import json
import math
import statistics

import pytest

from megatron_dynmix.compare.results import CellResult, paired_difference, spread, student_t, summarise
from megatron_dynmix.report.charts import losses_svg, weights_svg
from megatron_dynmix.report.pages import comparison_html, markdown
from megatron_dynmix.report.tables import comparison_tables, difference_text, spread_text

SOURCES = ["chat", "math"]


def cell(variant, seed, chat, math_loss):
    return CellResult(
        variant=variant,
        seed=seed,
        metrics={
            "mean_loss": (chat + math_loss) / 2,
            "worst_loss": max(chat, math_loss),
            "token_loss": chat,
            "perplexity": math.exp(chat),
            "loss/chat": chat,
            "loss/math": math_loss,
        },
        worst_source="chat",
        weights=((0, (0.5, 0.5)), (10, (0.25, 0.75))),
        tokens=1000,
        seconds=2.5,
    )


def three_seeds():
    return [
        *(cell("uniform", seed, 2 + seed / 10, 3) for seed in (1, 2, 3)),
        *(cell("gate-load", seed, 1.9 + seed / 10 + seed / 1000, 3) for seed in (1, 2, 3)),
    ]


# two-sided 95 % and 99 % points of Student's t, as printed in every table
@pytest.mark.parametrize(
    "confidence, degrees, t",
    [
        *((0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 4, 2.776), (0.95, 30, 2.042), (0.95, 1000, 1.962)),
        *((0.99, 2, 9.925), (0.99, 10, 3.169)),
    ],
)
def test_student_t_is_that_of_the_tables(confidence, degrees, t):
    assert student_t(confidence, degrees) == pytest.approx(t, abs=5e-4)


def test_spread():
    assert spread([1.0, 2.0, 4.0]).sd == pytest.approx(statistics.stdev([1, 2, 4]))
    assert spread([5.0]).sd is None and spread([5.0]).mean == 5


def test_paired_difference_by_hand():
    found = paired_difference([1.0, 2.0, 3.0], [1.5, 2.7, 3.3])  # differences -0.5, -0.7, -0.3: sd 0.2
    half = 4.302653 * 0.2 / math.sqrt(3)
    assert found.mean == pytest.approx(-0.5)
    assert (found.low, found.high) == pytest.approx((-0.5 - half, -0.5 + half), abs=1e-6)
    assert found.is_clear
    assert not paired_difference([1.0, 2.0], [2.0, 1.0]).is_clear


def test_what_all_seeds_share_takes_nothing_from_a_paired_difference():
    noise = [10.0, -20.0, 35.0]
    found = paired_difference([1 + n for n in noise], [1.1 + n for n in noise])
    assert found.high - found.low < 1e-9 and found.is_clear


def test_one_pair_has_no_interval():
    found = paired_difference([1.0], [2.0])
    assert (found.mean, found.low, found.high, found.is_clear) == (-1.0, None, None, False)


def test_summary_of_three_seeds():
    summary = summarise(["uniform", "gate-load"], SOURCES, three_seeds(), [])
    uniform, gate_load = summary["variants"]
    assert summary["baseline"] == "uniform"
    assert uniform["metrics"]["mean_loss"]["difference"] is None
    assert uniform["metrics"]["loss/chat"]["mean"] == pytest.approx(2.2)
    assert uniform["metrics"]["loss/chat"]["sd"] == pytest.approx(0.1)
    difference = gate_load["metrics"]["loss/chat"]["difference"]
    assert difference["mean"] == pytest.approx(-0.098) and difference["is_clear"]
    assert gate_load["metrics"]["loss/math"]["difference"]["mean"] == 0
    assert gate_load["final_weights"]["math"]["mean"] == 0.75
    json.dumps(summary, allow_nan=False)


def test_differences_are_of_the_seeds_that_both_have():
    results = [result for result in three_seeds() if (result.variant, result.seed) != ("uniform", 2)]
    gate_load = summarise(["uniform", "gate-load"], SOURCES, results, [])["variants"][1]
    assert gate_load["seeds"] == [1, 2, 3]
    assert gate_load["metrics"]["loss/chat"]["difference"]["count"] == 2


def test_tables_say_what_is_missing():
    failure = {"variant": "fixed", "seed": 1, "reason": "loss is NaN (exit code 1)"}
    one_seed = [cell("gate-load", 1, 2, 3)]
    losses, *_, failed = comparison_tables(summarise(["fixed", "gate-load"], SOURCES, one_seed, [failure]))
    assert "No variant is named uniform" in losses.note and "Of one seed" in losses.note
    assert not any("difference" in column for column in losses.header)
    assert [row[0] for row in losses.rows] == ["gate-load"]
    assert failed.rows == [["fixed", "1", "loss is NaN (exit code 1)"]]


def test_every_row_has_a_cell_for_every_column():
    results = [*three_seeds(), cell("fixed", 1, 2, 3)]
    for table in comparison_tables(summarise(["uniform", "gate-load", "fixed"], SOURCES, results, [])):
        assert {len(row) for row in table.rows} == {len(table.header)}, table.title


def test_numbers_as_text():
    assert spread_text({"mean": 1.23456, "sd": 0.1}) == "1.2346 ± 0.1000"
    assert spread_text({"mean": 1.23456, "sd": None}) == "1.2346"
    assert spread_text(None) == "-"
    clear = {"mean": -0.5, "low": -1.0, "high": -0.25, "is_clear": True}
    assert difference_text(clear) == "**-0.5000 [-1.0000, -0.2500]**"
    assert difference_text({"mean": 0.5, "low": None, "high": None, "is_clear": False}) == "+0.5000"


def test_pages_hold_every_table_and_escape_what_is_text():
    failure = {"variant": "fixed", "seed": 1, "reason": "<b>a|b</b>"}
    summary = summarise(["uniform", "gate-load", "fixed"], SOURCES, three_seeds(), [failure])
    tables = comparison_tables(summary)
    plots = [("Weights", weights_svg(summary)), ("Losses", losses_svg(summary))]
    page = comparison_html("A & B", tables, plots)
    assert "&lt;b&gt;a|b&lt;/b&gt;" in page and "<title>A &amp; B</title>" in page
    assert page.count("<svg") == 2 and "<strong>-0.049" in page
    assert not any(name in page for name in ('src="', 'href="http', "<script"))
    text = markdown("A & B", tables, [("Weights", "weights.svg")])
    assert "a\\|b" in text and "![Weights](weights.svg)" in text
    assert all(f"## {table.title}" in text for table in tables)


def test_plots_are_the_same_again():
    summary = summarise(["uniform", "gate-load"], SOURCES, three_seeds(), [])
    assert weights_svg(summary) == weights_svg(summary)
    assert losses_svg(summary).startswith("<svg")
