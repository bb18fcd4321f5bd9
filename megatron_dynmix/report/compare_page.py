"""The comparison as Markdown and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment
from markupsafe import Markup, escape

from megatron_dynmix.report.compare_tables import Table

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


def html(title: str, tables: Sequence[Table], plots: Sequence[tuple[str, str]]) -> str:
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
