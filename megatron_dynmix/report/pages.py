"""One HTML file out of summaries, charts and tables: everything is inside, nothing is fetched.

What a page of one run, and of several, is made of.

The comparison as Markdown and as one self-contained HTML page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from typing import Any

import orjson
from jinja2 import Environment
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from megatron_dynmix import __version__
from megatron_dynmix.report.charts import Chart, Palette, charts_of
from megatron_dynmix.report.overlay import overlaid
from megatron_dynmix.report.run import Run
from megatron_dynmix.report.summary import summary, warnings
from megatron_dynmix.report.tables import (
    Table,
    end_losses_table,
    end_weights_table,
    events_table,
    runs_table,
    sources_table,
)

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


def page_of_run(run: Run, now: float) -> Page:
    """A run explained by itself.

    Args:
        run: what was read.
        now: seconds since 1970.

    """
    charts, axes = charts_of(run, Palette.of(run.sources, importance(run)))
    return Page(
        title=f"Run {run.name}",
        paths=[str(run.path)],
        summaries=[("", summary(run, now), warnings(run))],
        charts=charts,
        axes=axes,
        tables=[("sources", sources_table(run))] if run.sources else [],
        last_tables=[("events", events_table(run))] if run.events else [],
        texts=[("Configuration", run.config_text)] if run.config_text else [],
    )


def page_of_runs(runs: Sequence[Run], now: float) -> Page:
    """Runs side by side.

    Args:
        runs: what was read; two or more.
        now: seconds since 1970.

    """
    names = distinct_names(runs)
    charts, axes = overlaid(runs, names)
    return Page(
        title=f"{len(runs)} runs compared",
        paths=[str(run.path) for run in runs],
        summaries=[(name, summary(run, now), warnings(run)) for name, run in zip(names, runs, strict=True)],
        charts=charts,
        axes=axes,
        tables=[
            ("runs", runs_table(runs, names)),
            ("end-weights", end_weights_table(runs, names)),
            ("end-losses", end_losses_table(runs, names)),
        ],
        texts=[
            (f"Configuration of {name}", run.config_text)
            for name, run in zip(names, runs, strict=True)
            if run.config_text
        ],
    )


def importance(run: Run) -> dict[str, float]:
    """Which sources deserve a colour: those with the largest shares at any time, the last counting double."""
    found = dict.fromkeys(run.sources, 0.0)
    for weights in run.weights:
        for name, share in weights.shares.items():
            found[name] = max(found[name], share)
    for name, share in run.weights[-1].shares.items() if run.weights else ():
        found[name] += share
    return found


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names; with as many of the folders above as tell them apart."""
    paths = [run.path.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the same folder twice is refused before")


_HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
.note { color: #808080; }
</style>
<h1>{{ title }}</h1>
{% for table in tables %}
<h2>{{ table.title }}</h2>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
<div class="wide"><table>
<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ bold(cell) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% for name, svg in plots %}
<h2>{{ name }}</h2>
{{ svg | safe }}
{% endfor %}
</html>
"""


def markdown(title: str, tables: Sequence[Table], plots: Sequence[tuple[str, str]]) -> str:
    """The tables, and links to the plots.

    Args:
        title: of the page.
        tables: in their order.
        plots: title and file name of each.

    """
    parts = [f"# {title}"]
    for table in tables:
        parts.append(f"## {table.title}")
        if table.note:
            parts.append(table.note)
        parts.append(markdown_table(table))
    parts += [f"## {name}\n\n![{name}]({file})" for name, file in plots]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """One table; numbers to the right."""
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def comparison_html(title: str, tables: Sequence[Table], plots: Sequence[tuple[str, str]]) -> str:
    """One page that needs no other file.

    Args:
        title: of the page.
        tables: in their order.
        plots: title and `<svg>` of each.

    """
    environment = Environment(autoescape=True)
    template = environment.from_string(_HTML, globals={"bold": _bold})
    return template.render(title=title, tables=tables, plots=plots)


def _bold(cell: str) -> str:
    """Markdown's marks as HTML; everything else is text."""
    if cell.startswith("**") and cell.endswith("**"):
        return Markup("<strong>") + escape(cell[2:-2]) + Markup("</strong>")
    return cell
