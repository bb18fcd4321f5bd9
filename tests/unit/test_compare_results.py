"""From the numbers of finished cells to tables and pages."""

import dataclasses
import json
import math
import re
import statistics
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from megatron_dynmix.compare.page import (
    comparison_tables,
    difference_text,
    markdown,
    page_of_comparison,
    spread_text,
)
from megatron_dynmix.compare.results import (
    MEANS,
    CellResult,
    Difference,
    Failure,
    Spread,
    compared,
    paired_difference,
    spread,
    student_t,
)
from megatron_dynmix.report.figures import OTHERS
from megatron_dynmix.report.pages import html
from megatron_dynmix.report.tables import Bold

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
    summary = compared(["uniform", "gate-load"], SOURCES, three_seeds(), [])
    uniform, gate_load = summary.variants
    assert summary.baseline == "uniform"
    assert uniform.metrics["mean_loss"].difference is None
    assert uniform.metrics["loss/chat"].mean == pytest.approx(2.2)
    assert uniform.metrics["loss/chat"].sd == pytest.approx(0.1)
    difference = gate_load.metrics["loss/chat"].difference
    assert difference.mean == pytest.approx(-0.098) and difference.is_clear
    assert gate_load.metrics["loss/math"].difference.mean == 0
    assert gate_load.final_weights["math"].mean == 0.75
    assert uniform.motion["turns"].mean == 0 and gate_load.motion["path"].mean == 0.25
    motion = comparison_tables(summary)["motion"]
    assert [row[1] for row in motion.rows] == ["10.0 ± 0.0"] * 2
    json.dumps(dataclasses.asdict(summary), allow_nan=False)


def test_differences_are_of_the_seeds_that_both_have():
    results = [result for result in three_seeds() if (result.variant, result.seed) != ("uniform", 2)]
    gate_load = compared(["uniform", "gate-load"], SOURCES, results, []).variants[1]
    assert gate_load.seeds == [1, 2, 3]
    assert gate_load.metrics["loss/chat"].difference.count == 2


def test_tables_say_what_is_missing():
    failure = Failure(variant="fixed", seed=1, reason="loss is NaN (exit code 1)")
    one_seed = [cell("gate-load", 1, 2, 3)]
    tables = comparison_tables(compared(["fixed", "gate-load"], SOURCES, one_seed, [failure]))
    losses, *_, failed = tables.values()
    assert "No variant is named uniform" in losses.note and "One seed has no" in losses.note
    assert not any("difference" in column for column in losses.header)
    assert [row[0] for row in losses.rows] == ["gate-load"]
    assert failed.rows == [["fixed", "1", "loss is NaN (exit code 1)"]]


def test_every_row_has_a_cell_for_every_column():
    results = [*three_seeds(), cell("fixed", 1, 2, 3)]
    for table in comparison_tables(
        compared(["uniform", "gate-load", "fixed"], SOURCES, results, [])
    ).values():
        assert {len(row) for row in table.rows} == {len(table.header)}, table.title


def test_numbers_as_text():
    assert spread_text(Spread(1.23456, 0.1, 3)) == "1.2346 ± 0.1000"
    assert spread_text(Spread(1.23456, None, 1)) == "1.2346"
    assert spread_text(None) == "-"
    clear = Difference(-0.5, -1.0, -0.25, 3, is_clear=True)
    assert difference_text(clear) == "-0.5000 [-1.0000, -0.2500]"
    assert isinstance(difference_text(clear), Bold)
    unclear = difference_text(Difference(0.5, None, None, 1, is_clear=False))
    assert unclear == "+0.5000" and not isinstance(unclear, Bold)


def test_markdown_and_page_hold_every_table_and_escape_what_is_text():
    failure = Failure(variant="fixed", seed=1, reason="<b>a|b</b>")
    summary = compared(["uniform", "gate-load", "fixed"], SOURCES, three_seeds(), [failure])
    page = page_of_comparison("A & B", Path("runs/grid"), summary)
    text = html(page, datetime(2026, 1, 2, 3, 4))
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)
    assert "&lt;b&gt;a|b&lt;/b&gt;" in own and "<title>A &amp; B</title>" in own
    assert "<strong>-0.049" in own and "Made 2026-01-02 03:04" in own and "from runs/grid" in own
    assert not any(name in own for name in ('src="', 'href="http'))
    assert all(f'id="{name}"' in own for name in [*page.tables, *(chart.id for chart in page.charts)])
    assert "Cells that failed: 1" in own and "is that of gate-load: 2.5510 nats" in own
    written = markdown("A & B", page.tables)
    assert "a\\|b" in written and "**-0.049" in written and "(comparison.html)" in written
    assert all(f"## {table.title}" in written for table in page.tables.values())


def test_charts_hold_the_numbers_of_every_cell():
    summary = compared(["uniform", "gate-load"], SOURCES, three_seeds(), [])
    page = page_of_comparison("A", Path("grid"), summary)
    weights, losses = page.charts
    assert [set(traces) for traces in weights.legend.values()] == [{0, 2, 4, 6, 8, 10}, {1, 3, 5, 7, 9, 11}]
    math_of_the_last = weights.figure.data[-1]
    assert page.axes[math_of_the_last.meta] == [0, 10] and math_of_the_last.xaxis == "x2"
    np.testing.assert_allclose(math_of_the_last.y, [0.5, 0.75])
    assert len(page.axes) == 1, "equal axes are held once"
    seeds, mean = losses.figure.data[:2]
    np.testing.assert_allclose(seeds.x, [2.1, 2.2, 2.3, 2.001, 2.102, 2.203], rtol=1e-6)
    np.testing.assert_allclose(mean.x, [2.2, 2.102], rtol=1e-6)
    assert seeds.y == ("uniform",) * 3 + ("gate-load",) * 3 and mean.y == ("uniform", "gate-load")
    assert [note.text for note in losses.figure.layout.annotations] == SOURCES


def test_a_comparison_without_a_finished_cell_has_a_page():
    failure = Failure(variant="fixed", seed=1, reason="killed")
    page = page_of_comparison("A", Path("grid"), compared(["fixed"], SOURCES, [], [failure]))
    assert list(page.tables) == ["failures"] and page.charts == []
    assert "No cell has finished." in html(page, datetime(2026, 1, 2))


def test_sources_without_a_color_share_one_box():
    many = [f"source_{number}" for number in range(12)]
    metrics = {name: 2.0 for name in (*MEANS, "loss/source_0")}
    cells = [dataclasses.replace(cell("uniform", 1, 2, 3), weights=((0, (1 / 12,) * 12),), metrics=metrics)]
    weights, _ = page_of_comparison("A", Path("grid"), compared(["uniform"], many, cells, [])).charts
    *_, (box, traces) = weights.legend.items()
    assert box == ("2 others", OTHERS) and len(traces) == 2
