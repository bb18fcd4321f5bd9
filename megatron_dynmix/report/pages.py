"""A page: one HTML file out of summaries, charts and tables, which fetches nothing.

The pages of one run and of several are put together here, that of a grid of runs in `compare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson
from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron_dynmix import __version__
from megatron_dynmix.errors import InputError
from megatron_dynmix.report.charts import charts_of
from megatron_dynmix.report.figures import Axes, Chart, Palette
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
    """What it was made from."""
    summaries: Sequence[tuple[str, Sequence[str], Sequence[str]]]
    """Heading, sentences and warnings."""
    tables: Mapping[str, Table]
    """By id, before the charts."""
    charts: Sequence[Chart]
    axes: Axes
    last_tables: Mapping[str, Table] = field(default_factory=dict)
    """By id, after the charts."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Configurations by heading."""


def html(page: Page, made: datetime) -> str:
    """Return the page as text, with the time at which it was made."""
    contents = [("summary", "Summary")]
    contents += [(name, table.title) for name, table in page.tables.items()]
    contents += [(chart.id, chart.title) for chart in page.charts]
    contents += [(name, table.title) for name, table in page.last_tables.items()]
    contents += [(f"configuration-{place}", heading) for place, heading in enumerate(page.texts, start=1)]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    of_table = environment.from_string(_file("table.html"))
    return environment.from_string(_file("page.html")).render(
        page=page,
        made=f"{made:%Y-%m-%d %H:%M}",
        version=__version__,
        contents=contents,
        most_rows=MOST_ROWS,
        table=lambda table: Markup(of_table.render(table=table)),
        data=_data(page),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        plotly=Markup(get_plotlyjs()),
    )


def write_page(page: Page, output: Path) -> str:
    """Write a page to a file, and return a line that says so; `InputError` if it cannot be written."""
    text = html(page, datetime.now())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror or error}); give another file with --output"
        ) from None
    return f"written: {output} ({len(text) / 1e6:.1f} MB), open it in any browser"


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _data(page: Page) -> Markup:
    """Return figures and axes as JSON that cannot end the element it stands in."""
    charts: dict[str, dict[str, Any]] = {}
    for chart in page.charts:
        charts[chart.id] = chart.figure.to_dict()
        if chart.frames is not None:
            charts[chart.id]["frames"] = chart.frames
    text = orjson.dumps({"axes": page.axes, "charts": charts}, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return Markup(text.replace("<", "\\u003c"))


def page_of_run(run: Run, now: float) -> Page:
    """Return a page that explains a run; `now` is in seconds since 1970."""
    charts, axes = charts_of(run, Palette.of(run.sources, importance(run)))
    return Page(
        title=f"Run {run.name}",
        paths=[str(run.path)],
        summaries=[("", summary(run, now), warnings(run))],
        tables={"sources": sources_table(run)} if run.sources else {},
        charts=charts,
        axes=axes,
        last_tables={"events": events_table(run)} if run.events else {},
        texts={"Configuration": run.config_text} if run.config_text else {},
    )


def page_of_runs(runs: Sequence[Run], now: float) -> Page:
    """Return a page with two runs or more side by side; `now` is in seconds since 1970."""
    named = dict(zip(distinct_names(runs), runs, strict=True))
    charts, axes = overlaid(named)
    return Page(
        title=f"{len(runs)} runs compared",
        paths=[str(run.path) for run in runs],
        summaries=[(name, summary(run, now), warnings(run)) for name, run in named.items()],
        tables={
            "runs": runs_table(named),
            "end-weights": end_weights_table(named),
            "end-losses": end_losses_table(named),
        },
        charts=charts,
        axes=axes,
        texts={f"Configuration of {name}": run.config_text for name, run in named.items() if run.config_text},
    )


def importance(run: Run) -> dict[str, float]:
    """Return which sources deserve a color: their largest share at any time, and the last once more."""
    found = dict.fromkeys(run.sources, 0.0)
    for weights in run.weights:
        for name, share in weights.shares.items():
            found[name] = max(found[name], share)
    for name, share in run.weights[-1].shares.items() if run.weights else ():
        found[name] += share
    return found


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """Return the folders' names, with as many of the folders above as tell them apart."""
    paths = [run.path.resolve() for run in runs]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the same folder twice is refused before")
