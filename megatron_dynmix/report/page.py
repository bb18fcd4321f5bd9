"""One HTML file out of summaries, charts and tables: everything is inside, nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from typing import Any

import orjson
from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron_dynmix import __version__
from megatron_dynmix.report.chart import Chart
from megatron_dynmix.report.compare_tables import Table

MOST_ROWS = 20
"""A longer table is folded."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What stands on a page, in its order."""

    title: str
    paths: Sequence[str]
    """Of the runs."""
    summaries: Sequence[tuple[str, Sequence[str], Sequence[str]]]
    """Heading, sentences and warnings of each run."""
    charts: Sequence[Chart]
    axes: Mapping[str, Sequence[float]]
    """That curves share, by the name they give in `meta`."""
    tables: Sequence[tuple[str, Table]]
    """Id and table, before the charts."""
    last_tables: Sequence[tuple[str, Table]] = ()
    """After them."""
    texts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """Heading and text of each configuration."""


def html(page: Page, made: datetime) -> str:
    """The page as text.

    Args:
        page: what stands on it.
        made: when.

    """
    contents = [("summary", "Summary")]
    contents += [(name, table.title) for name, table in page.tables]
    contents += [(chart.id, chart.title) for chart in page.charts]
    contents += [(name, table.title) for name, table in page.last_tables]
    contents += [(f"configuration-{place}", text[0]) for place, text in enumerate(page.texts, start=1)]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    of_table = environment.from_string(_file("table.html"))
    return environment.from_string(_file("page.html")).render(
        title=page.title,
        made=f"{made:%Y-%m-%d %H:%M}",
        version=__version__,
        paths=page.paths,
        contents=contents,
        summaries=page.summaries,
        charts=page.charts,
        tables=page.tables,
        last_tables=page.last_tables,
        most_rows=MOST_ROWS,
        texts=page.texts,
        table=lambda table: Markup(of_table.render(table=table)),
        data=_data(page),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        plotly=Markup(get_plotlyjs()),
    )


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _data(page: Page) -> Markup:
    """Figures and axes as JSON that cannot end the element it stands in."""
    charts: dict[str, dict[str, Any]] = {}
    for chart in page.charts:
        charts[chart.id] = chart.figure.to_dict()
        if chart.frames is not None:
            charts[chart.id]["frames"] = chart.frames
    text = orjson.dumps({"axes": page.axes, "charts": charts}, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return Markup(text.replace("<", "\\u003c"))
