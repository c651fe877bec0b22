"""The charts of a page as a picture, by matplotlib without a display: what plotly's traces say, as far as ours do."""

from __future__ import annotations

import html
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .page import Chart, Trace

COLORS = {"plain": "#7d8590", "penalty": "#d9822b", "published": "#8250df", "gapt": "#1f6feb"}
OTHER_COLORS = ("#1a7f37", "#cf222e", "#0e7490", "#9a6700")
FAINT = "#656d76"
_DASHES = {"solid": "-", "dash": "--", "dot": ":"}

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "#afb8c1",
    "axes.labelcolor": FAINT,
    "axes.axisbelow": True,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "ytick.major.size": 0,
    "text.color": "#1f2328",
    "figure.facecolor": "white",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def color_of(name: str, place: int) -> str:
    """The colour of a run: that of its method where it is named so, else by its place."""
    return COLORS.get(name, OTHER_COLORS[place % len(OTHER_COLORS)])


def draw_charts(
    charts: Sequence[Chart], path: str | os.PathLike[str], *, title: str, columns: int = 1, phases: int | None = None
) -> Path:
    """Write what charts show at first as one picture, in the format that the suffix names; missing folders are made.

    In a single column they have one axis of steps, and legends beside them. ``phases`` is the run whose are shaded.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: needs no display, and leaves the caller's backend alone

    beside = columns == 1
    heights = [max(map(_height, charts[i : i + columns])) for i in range(0, len(charts), columns)]
    with mpl.rc_context(STYLE):
        size = (9.6 if beside else 5.4 * columns, sum(heights) + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(heights), columns, sharex=beside, squeeze=False, height_ratios=heights).ravel()
        for axes, chart in zip(grid, charts, strict=False):
            _draw(figure, axes, chart, phases, beside=beside)
        for axes in grid[len(charts) :]:
            axes.set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=160, bbox_inches="tight", pad_inches=0.18)
    return target


def _height(chart: Chart) -> float:
    """In inches: over steps, a heat map is as high as its layers need."""
    heat = next((trace for trace in chart.traces if trace["type"] == "heatmap"), None)
    if not chart.over_steps:
        return 3.0
    return 2.8 if heat is None else min(4.0, 0.9 + 0.25 * len(heat["y"]))


def _draw(figure: Any, axes: Any, chart: Chart, phases: int | None, *, beside: bool) -> None:
    shown = [trace for trace in chart.traces if chart.shows(trace, phases) and "faint" not in trace.get("meta", {})]
    heat = next((trace for trace in shown if trace["type"] == "heatmap"), None)
    x, y = chart.layout["xaxis"], chart.layout["yaxis"]
    if "range" in x:
        axes.set_xlim(*x["range"])
    if heat is None:
        _draw_lines(axes, shown, y)
        _add_legend(axes, chart.note, beside=beside)
    else:
        _draw_heat(figure, axes, heat, beside=beside)
        if y.get("autorange") == "reversed":
            axes.invert_yaxis()
    for axis, layout in ((axes.xaxis, x), (axes.yaxis, y)):
        if "tickvals" in layout:
            axis.set_ticks(layout["tickvals"], [html.unescape(text) for text in layout["ticktext"]], fontsize=8)
        axis.set_label_text(html.unescape(layout.get("title", {}).get("text", "layer")))
    if beside:
        axes.label_outer()
    view = f": {chart.views[0][1]}" if chart.views else ""
    axes.set_title(f"{chart.title}{view}", loc="left", fontsize=10, fontweight="bold")


def _draw_lines(axes: Any, traces: Sequence[Trace], y: dict[str, Any]) -> None:
    before: Any = None
    for trace in traces:
        if trace.get("fill") == "toself":
            for first, last in zip(trace["x"][::6], trace["x"][2::6], strict=True):
                axes.axvspan(first, last, color=_color(trace["fillcolor"]), lw=0)
        elif trace.get("yaxis") != "y2":  # the marks of switches are for those who can ask for their reasons
            values = np.array(trace["y"], dtype=float)
            if trace.get("fill") == "tonexty":
                axes.fill_between(trace["x"], before, values, color=_color(trace["fillcolor"]), lw=0)
            elif trace["line"]["width"]:
                _draw_line(axes, trace, values)
            before = values
    axes.grid(axis="y")
    if "range" in y:
        axes.set_ylim(*y["range"])
    elif "rangemode" in y:
        axes.set_ylim(bottom=0)
    if y.get("zeroline"):
        axes.axhline(0.0, color=FAINT, lw=0.8)


def _add_legend(axes: Any, note: str, *, beside: bool) -> None:
    if not axes.get_legend_handles_labels()[1]:
        return
    if not beside:
        axes.legend(loc="best", framealpha=0.8)
        return
    title = textwrap.fill(note, 34)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=title, title_fontsize=8, alignment="left")
    legend.get_title().set_color(FAINT)


def _draw_line(axes: Any, trace: Trace, values: Any) -> None:
    line, marks = trace["line"], trace.get("marker", {})
    dashed, color = line.get("dash", "solid") == "dash", _color(line["color"])
    text = f"{html.unescape(trace['name'])}  {trace.get('meta', {}).get('end', '')}".rstrip()
    # Solid lines name their colours, and one grey line says what dashes mean.
    text = "" if dashed and np.isfinite(values).any() else text
    axes.plot(
        trace["x"], values, color=color, lw=0.8 * line["width"], alpha=trace.get("opacity"), label=text or None,
        ls=_DASHES[line.get("dash", "solid")] if "lines" in trace["mode"] else "none",
        marker="o" if "markers" in trace["mode"] and not dashed else None, ms=0.6 * marks.get("size", 0),
    )  # fmt: skip
    if "error_y" in trace:
        error = np.array(trace["error_y"]["array"], dtype=float)
        axes.fill_between(trace["x"], values - error, values + error, color=color, alpha=0.15, lw=0)


def _draw_heat(figure: Any, axes: Any, trace: Trace, *, beside: bool) -> None:
    values = np.array(trace["z"], dtype=float)
    names = [html.unescape(str(name)) for name in trace["y"]]
    columns = np.arange(values.shape[1] + 1) - 0.5
    if beside:  # over steps, of which each value names the last
        steps = np.asarray(trace["x"], dtype=float)
        columns = np.concatenate([[max(0.0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0.0], steps])
    mesh = axes.pcolormesh(
        columns, np.arange(len(names) + 1) - 0.5, values, cmap=trace["colorscale"].replace("Viridis", "viridis"),
        vmin=trace.get("zmin"), vmax=trace.get("zmax"), rasterized=True,
    )  # fmt: skip
    every = -(-len(names) // 16)
    axes.set_yticks(range(0, len(names), every), names[::every])
    bar = {"cax": axes.inset_axes((1.015, 0.0, 0.02, 1.0))} if beside else {"ax": axes, "shrink": 0.9}
    about = trace["colorbar"].get("title", {}).get("text") or trace["meta"].get("view", "")
    figure.colorbar(mesh, label=html.unescape(about), **bar).outline.set_visible(False)


def _color(text: str) -> Any:
    """A colour of plotly's, as matplotlib has it."""
    parts = re.findall(r"[\d.]+", text) if text.startswith("rgba") else []
    return (*(int(part) / 255 for part in parts[:3]), float(parts[3])) if parts else text
