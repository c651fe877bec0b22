"""One self-contained HTML page of plotly charts and tables. It opens without a network.

A chart is made of plotly's traces, which :mod:`gapt_optim._display.pictures` draws too. A trace says in its ``meta``
what it belongs to: a ``run`` (a checkbox hides it), a ``view`` (a select beside the chart chooses it), the ``phases``
of a run (a select chooses whose are shaded). With ``faint`` it is on the page alone, and ``end`` is what the legend of
a picture says of it.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__

if TYPE_CHECKING:
    from pandas import DataFrame

Trace = dict[str, Any]

_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage"], ["zoom2d", "pan2d"], ["resetScale2d"]],
}


@dataclass
class Chart:
    """One figure of a page."""

    title: str
    note: str
    """One line below the title: what is drawn."""
    alternative: str
    """What the chart shows, for those who cannot see it."""
    traces: list[Trace]
    layout: dict[str, Any]
    views: Sequence[tuple[str, str]] = ()
    """(key, label) of what a select offers; the first is shown."""
    over_steps: bool = False
    """Charts over steps zoom together."""
    tall: bool = False
    run: int | None = None
    """The chart is of this run alone."""

    def shows(self, trace: Trace, phases: int | None = None) -> bool:
        """Whether a trace is there at first: that of the first view, and of the run whose phases are shaded."""
        meta = trace.get("meta") or {}
        other_view = bool(self.views) and meta.get("view", self.views[0][0]) != self.views[0][0]
        return not other_view and meta.get("phases", phases) == phases


@dataclass
class Page:
    """What a page is made of, from top to bottom."""

    title: str
    subtitle: str
    runs: Sequence[tuple[str, str]] = ()
    """(name, colour) of what can be hidden."""
    phases: int | None = None
    """The run whose phases are shaded at first; None where nothing is shaded."""
    sections: list[tuple[str, str, list[Chart]]] = field(default_factory=list)
    """(heading, HTML, charts)"""

    def add(self, heading: str, content: str, charts: Iterable[Chart] = ()) -> None:
        """A section, where there is anything in it."""
        if content or (charts := list(charts)):
            self.sections.append((heading, content, list(charts)))

    def html(self) -> str:
        """Raises ImportError where plotly, which brings the drawing code, is not installed."""
        from plotly.offline import get_plotlyjs

        files, places = resources.files(__package__), count()
        frame, css, js = (files.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
        body = []
        for heading, content, charts in self.sections:
            figures = "".join(self._figure(chart, f"chart{next(places)}") for chart in charts)
            grid = f'<div class="grid">{figures}</div>' if figures else ""
            body.append(f"<section><h2>{html.escape(heading)}</h2>{content}{grid}</section>")
        return frame.format(
            title=html.escape(self.title),
            subtitle=html.escape(self.subtitle),
            css=css,
            js=js,
            controls=self._controls(),
            body="".join(body),
            version=html.escape(__version__),
            plotly=get_plotlyjs(),
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page as UTF-8; missing folders are made."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.html(), encoding="utf-8")
        return target

    def _controls(self) -> str:
        parts = []
        if len(self.runs) > 1:
            boxes = "".join(
                f'<label><input type="checkbox" data-run="{i}" checked>'
                f'<span class="swatch" style="background:{color}"></span>{html.escape(name)}</label>'
                for i, (name, color) in enumerate(self.runs)
            )
            parts.append(f"<fieldset><legend>Show</legend>{boxes}</fieldset>")
        if self.phases is not None and len(self.runs) > 1:
            names = [(str(i), name) for i, (name, _) in enumerate(self.runs)]
            parts.append(f"<label>Phases of {_select('phases', names, chosen=str(self.phases))}</label>")
        parts.append('<button id="theme" type="button">Dark</button>')
        return "".join(parts)

    def _figure(self, chart: Chart, name: str) -> str:
        import plotly.graph_objects as go
        import plotly.io

        for trace in chart.traces:
            trace["visible"] = chart.shows(trace, self.phases)
        drawn = plotly.io.to_html(
            go.Figure({"data": chart.traces, "layout": chart.layout}),
            config=_CONFIG, include_plotlyjs=False, full_html=False, div_id=name, default_height="100%",
        )  # fmt: skip
        title, choose, view = html.escape(chart.title), "", ""
        if chart.views:
            about = f"What {title} shows"
            choose = f'<label class="choose">Show {_select(f"{name}-view", chart.views, about)}</label>'
            view = f': <span class="view">{html.escape(chart.views[0][1])}</span>'
        mark = '<script>performance.mark("first-chart")</script>' if name == "chart0" else ""
        of_run = "" if chart.run is None else f' data-run="{chart.run}"'
        kinds = f"plot{' tall' if chart.tall else ''}{' over-steps' if chart.over_steps else ''}"
        return (
            f"<figure{of_run}><figcaption><h3>{title}{view}</h3><p>{html.escape(chart.note)}</p></figcaption>{choose}"
            f'<div class="{kinds}" role="img" tabindex="0" aria-label="{html.escape(chart.alternative)}">{drawn}</div>'
            f"</figure>{mark}"
        )


def line_trace(x: Any, y: Any, name: str, color: str, *, width: float = 2, dash: str = "solid", **more: Any) -> Trace:
    """A line of plotly's, whose values show on hover; ``more`` of it replaces what is so."""
    trace = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "name": label(name),
        "line": {"color": color, "width": width, "dash": dash},
        "hovertemplate": "%{y:.4g}<extra>" + label(name) + "</extra>",
    }
    return trace | more


def heat_trace(frame: DataFrame, unit: str, **more: Any) -> Trace:
    """A heat map of plotly's, whose values show on hover; ``more`` of it replaces what is so."""
    trace: Trace = {
        "type": "heatmap",
        "x": [label(name) for name in frame.columns],
        "y": [label(name) for name in frame.index],
        "z": frame.to_numpy(dtype="float32"),
        "colorscale": "Viridis",
        "colorbar": {"thickness": 10, "title": {"text": label(unit)}},
        "hovertemplate": "%{y}<br>%{x}: %{z:.4g}<extra></extra>",
    }
    return trace | more


def label(text: object) -> str:
    """A text for plotly, which reads some HTML tags in labels; long ones are cut."""
    text = shortened(text)
    # MathJax is not there, yet a leading and a closing dollar sign would be asked for it.
    return html.escape(text, quote=False).replace("$", "&#36;").replace("%{", "%&#123;").replace("\n", " ")


def shortened(text: object, limit: int = 60) -> str:
    """A text of at most so many characters."""
    text = str(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def bullets(items: Sequence[str]) -> str:
    """A list of texts that are HTML already; nothing where there are none."""
    return f'<ul class="notes">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def base_layout(**changes: Any) -> dict[str, Any]:
    """A chart without frame, whose legend is the page's own. The style sheet colours it."""
    layout: dict[str, Any] = {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "size": 12},
        "margin": {"l": 52, "r": 16, "t": 28, "b": 40},  # buttons above the plot, not over it
        "showlegend": False,
        "hovermode": "x",
        "hoverlabel": {"align": "left"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        "xaxis": {"zeroline": False, "title": {"text": "step", "standoff": 6}, "automargin": True},
        "yaxis": {"zeroline": False, "automargin": True},
    }
    for key, value in changes.items():
        layout[key] = {**layout[key], **value} if isinstance(layout.get(key), dict) else value
    return layout


def _select(name: str, options: Sequence[tuple[str, str]], about: str = "", chosen: str = "") -> str:
    items = "".join(
        f'<option value="{html.escape(key)}"{" selected" if key == chosen else ""}>{html.escape(shortened(text))}'
        "</option>"
        for key, text in options
    )
    said = f' aria-label="{about}"' if about else ""
    return f'<select id="{name}"{said}>{items}</select>'
