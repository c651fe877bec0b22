"""One self-contained HTML page: its frame, its charts, and the escaping of every text that is not ours.

A chart is a plotly figure as plain data. Its traces say in ``meta`` what they belong to: a ``run`` (a checkbox hides
it), a ``view`` (a select beside the chart chooses it), the ``phases`` of a run (a select chooses it).
"""

from __future__ import annotations

import base64
import functools
import gzip
import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from .._version import __version__

Trace = dict[str, Any]


@dataclass
class Chart:
    """One figure of the page."""

    title: str
    note: str
    """One line below the title: what is drawn."""
    alternative: str
    """What the chart shows, for those who cannot see it."""
    data: list[Trace]
    layout: dict[str, Any]
    columns: Sequence[str] = ()
    """Of the table of values."""
    rows: Sequence[Sequence[object]] = ()
    views: Sequence[tuple[str, str]] = ()
    """(key, label) of what a select offers."""
    group: str | None = None
    """Charts of one group zoom together."""
    tall: bool = False
    wide: bool = False
    run: int | None = None
    """The chart is of this run alone."""


@dataclass
class Page:
    """What a page is made of, from top to bottom."""

    title: str
    subtitle: str
    runs: Sequence[tuple[str, str]]
    """(name, colour) of what can be hidden."""
    phases: int | None = None
    """The run whose phases are shaded at first; None where nothing is shaded."""
    sections: list[tuple[str, str, str, list[Chart]]] = field(default_factory=list)
    """(anchor, heading, HTML, charts)"""

    def add(self, anchor: str, heading: str, content: str, charts: Iterable[Chart] = ()) -> None:
        self.sections.append((anchor, heading, content, list(charts)))


def escaped(text: object) -> str:
    """A text for HTML."""
    return html.escape(str(text), quote=True)


def label(text: object) -> str:
    """A text for plotly, which reads some HTML tags in labels; long ones are cut."""
    text = shortened(text)
    # MathJax is not there, yet a leading and a closing dollar sign would be asked for it.
    return html.escape(text, quote=False).replace("$", "&#36;").replace("%{", "%&#123;").replace("\n", " ")


def shortened(text: object, limit: int = 60) -> str:
    """A text of at most so many characters."""
    text = str(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table: so many significant digits, an en dash for none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:.{digits}g}" if abs(value) < 10**digits or abs(value) >= 1e9 else f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", kind: str = "") -> str:
    """An HTML table whose first column heads the rows. Cells are escaped, :class:`Markup` is not."""
    head = "".join(f'<th scope="col">{_cell(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{_cell(first)}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    about = f'<p class="caption">{escaped(caption)}</p>' if caption else ""
    kind = f' class="{kind}"' if kind else ""
    region = escaped(caption or "table")
    return (
        f'{about}<div class="scroll" tabindex="0" role="region" aria-label="{region}">'
        f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


class Markup(str):
    """HTML that is ours and already escaped."""


def _cell(value: object) -> str:
    if isinstance(value, Markup):
        return value
    return number(value) if isinstance(value, float) or value is None else escaped(value)


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """Five significant digits, and None for what JSON does not have: enough for a screen, and small."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.5g}") for value in values]


def base_layout(**changes: Any) -> dict[str, Any]:
    """A chart without frame, whose legend is the page's own."""
    layout: dict[str, Any] = {
        "margin": {"l": 52, "r": 16, "t": 28, "b": 40},
        "showlegend": False,
        "hovermode": "x",
        "dragmode": "zoom",
        "xaxis": {"zeroline": False, "title": {"text": "step", "standoff": 6}, "automargin": True},
        "yaxis": {"zeroline": False, "automargin": True},
    }
    for key, value in changes.items():
        layout[key] = {**layout[key], **value} if isinstance(layout.get(key), dict) else value
    return layout


def write_page(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write the page. Raises ImportError where plotly, which brings the drawing code, is not installed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(page), encoding="utf-8")
    return target


def render(page: Page) -> str:
    """The page as HTML."""
    charts: list[dict[str, Any]] = []
    parts = []
    for anchor, heading, content, of_section in page.sections:
        figures = "".join(_figure(chart, f"chart{len(charts) + i}") for i, chart in enumerate(of_section))
        charts += [_data(chart, f"chart{len(charts) + i}") for i, chart in enumerate(of_section)]
        grid = f'<div class="grid">{figures}</div>' if figures else ""
        parts.append(
            f'<section id="{anchor}" aria-labelledby="{anchor}-title"><h2 id="{anchor}-title">{escaped(heading)}</h2>'
            f"{content}{grid}</section>"
        )
    return _FRAME.format(
        title=escaped(page.title),
        subtitle=escaped(page.subtitle),
        css=_resource("page.css"),
        js=_resource("page.js"),
        controls=_controls(page, charts),
        body="".join(parts),
        version=escaped(__version__),
        plotly=_plotly(),
        charts=_packed(json.dumps(charts, allow_nan=False, separators=(",", ":"))),
    )


def _controls(page: Page, charts: Sequence[dict[str, Any]]) -> str:
    parts = []
    if len(page.runs) > 1:
        boxes = "".join(
            f'<label><input type="checkbox" data-run="{i}" checked><span class="swatch" style="background:{color}">'
            f"</span>{escaped(name)}</label>"
            for i, (name, color) in enumerate(page.runs)
        )
        parts.append(f"<fieldset><legend>Show</legend>{boxes}</fieldset>")
    if page.phases is not None:
        options = "".join(
            f'<option value="{i}"{" selected" if i == page.phases else ""}>{escaped(shortened(name))}</option>'
            for i, (name, _) in enumerate(page.runs)
        )
        parts.append(f'<label><span class="nowrap">Phases of</span> <select id="phases">{options}</select></label>')
    if any(chart["group"] for chart in charts):
        parts.append('<button id="zoom" type="button">Whole run</button>')
    parts.append('<button id="theme" type="button">Dark</button>')
    return "".join(parts)


def _figure(chart: Chart, name: str) -> str:
    choose = ""
    if chart.views:
        options = "".join(f'<option value="{escaped(key)}">{escaped(text)}</option>' for key, text in chart.views)
        choose = (
            f'<label class="choose">Show <select data-chart="{name}" aria-label="What {escaped(chart.title)} shows">'
            f"{options}</select></label>"
        )
    values = ""
    if chart.rows:
        values = (
            f"<details><summary>Values as a table</summary>{table(chart.columns, chart.rows, chart.title)}</details>"
        )
    run = "" if chart.run is None else f' data-run="{chart.run}"'
    classes = f"plot{' tall' if chart.tall else ''}"
    return (
        f"<figure{run}{' class=wide' if chart.wide else ''}><figcaption><h3>{escaped(chart.title)}</h3>"
        f"<p>{escaped(chart.note)}</p></figcaption>{choose}"
        f'<div id="{name}" class="{classes}" role="img" tabindex="0" aria-label="{escaped(chart.alternative)}" '
        f'aria-describedby="keys"></div>{values}</figure>'
    )


def _data(chart: Chart, name: str) -> dict[str, Any]:
    views = [{"key": key, "label": text} for key, text in chart.views] or None
    return {"id": name, "data": chart.data, "layout": chart.layout, "group": chart.group, "views": views}


def _packed(text: str) -> str:
    """Compressed, in characters that no HTML parser minds."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 9, mtime=0)).decode("ascii")


@functools.cache
def _plotly() -> str:
    """The drawing code, packed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('pages are drawn with plotly: pip install "gapt_optim[viewing]"') from error
    return _packed(get_plotlyjs())


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


_FRAME = """<!DOCTYPE html>
<html lang="en" data-theme="light">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>{title}</h1>
<p class="faint">{subtitle}</p>
<div class="controls" role="group" aria-label="What the page shows">{controls}</div>
</header>
<p id="failed" class="failed" role="alert" hidden>The charts could not be drawn; the tables below hold the
values. The page needs a browser of 2023 or later.</p>
<noscript><p class="failed">Charts need JavaScript. The tables below hold the values.</p></noscript>
<main id="main">
{body}
</main>
<footer><p id="keys" class="no-print">
Drag over a chart to zoom. With a chart in focus:
+ and &minus; zoom, the arrow keys move, 0 shows all.</p>
<p>Made by gapt_optim {version}. Everything on this page is in this file.</p></footer>
<script type="text/plain" id="plotly">{plotly}</script>
<script type="text/plain" id="charts">{charts}</script>
<script>{js}</script>
</body>
</html>
"""
