"""A profile as a table in the terminal, a picture and a page; two of them side by side."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from .._display.page import Chart, Page, Trace, base_layout, bullets, label
from .._display.pictures import FAINT, OTHER_COLORS, STYLE, save_figure
from .._display.tables import MISSING, common_prefix, html_table, number
from .layer_profile import LayerProfile, Profile

COLORS = ("#1f6feb", "#d9822b", *OTHER_COLORS, "#8250df")
KINDS = {
    ("cosine", True): "cosine, centred",
    ("cosine", False): "cosine",
    ("linear", True): "linear, centred",
    ("linear", False): "linear",
}
KIND_COLORS = dict(zip(KINDS, COLORS, strict=False))


@dataclass
class Line:
    """One line over the layers."""

    name: str
    values: list[float | None]
    color: str
    dashed: bool = False
    run: int | None = None
    """Number of the profile it belongs to, where there are several."""
    view: str | None = None


@dataclass
class Panel:
    """One chart over the layers, for the picture and the page alike."""

    title: str
    unit: str
    note: str
    lines: list[Line]
    layers: list[str]
    views: list[tuple[str, str]] = field(default_factory=list)


def window_name(window: int | None) -> str:
    return "whole sequences" if window is None else f"windows of {window}"


def panels(profiles: Mapping[str, Profile]) -> list[Panel]:
    """What there is to see of one profile, or of several with as many layers."""
    several = len(profiles) > 1
    first = next(iter(profiles.values()))
    layers = first.names
    found = []
    for window in first.windows:
        alpha = 2.0 if 2.0 in first.orders else first.orders[0]
        order = "" if alpha == 2 else f", order {alpha:g}"
        lines, views = [], []
        for kind, kind_name in KINDS.items():
            views.append((kind_name, f"{kind_name} kernel"))
            for i, (name, one) in enumerate(profiles.items()):
                for first_token in (True, False):
                    values = [_entropy(layer, kind, alpha, window, first_token) for layer in one.layers]
                    if all(value is None for value in values):
                        continue
                    said = "" if first_token else ", without first token"
                    text = f"{name}{said}" if several else f"{kind_name}{said}"
                    color = COLORS[i % len(COLORS)] if several else KIND_COLORS[kind]
                    lines.append(
                        Line(
                            text, values, color, not first_token, i if several else None, kind_name if several else None
                        )
                    )
        title = f"Entropy, {window_name(window)}{order}"
        found.append(Panel(title, "nats", _with_dashes("", lines), lines, layers, views if several else []))
    for title, unit, note, read in _readings(first.windows):
        lines = []
        for i, (name, one) in enumerate(profiles.items()):
            for first_token in (True, False):
                values = [read(layer, first_token) for layer in one.layers]
                if any(value is not None for value in values):
                    said = "with all tokens" if first_token else "without first token"
                    text = name if several and first_token else f"{name}, {said}" if several else said
                    color = COLORS[i % len(COLORS)]
                    lines.append(Line(text, values, color, not first_token, i if several else None))
        if lines:
            found.append(Panel(title, unit, _with_dashes(note, lines), lines, layers))
    return found


def _with_dashes(note: str, lines: Sequence[Line]) -> str:
    said = "Dashed: without the first token of each sequence."
    return f"{note} {said}".strip() if any(line.dashed for line in lines) else note


_Reading = tuple[str, str, str, Callable[[LayerProfile, bool], float | None]]


def _readings(windows: Sequence[int | None]) -> list[_Reading]:
    """Title, unit, note and reader (of a layer, with the first token or without) of each chart beside the entropies."""
    long = "A few long tokens lower the linear entropy by themselves."
    common = "One vector that all tokens share lowers what is not centred."
    curved = (
        "Mean angle between successive steps from token to token. Independent tokens have 120, a random walk has 90."
    )
    readings: list[_Reading] = []
    for window in windows:
        where = window_name(window)
        ratio, share = (partial(_shape_of, window, name) for name in ("norm_ratio", "mean_share"))
        readings.append((f"Norm ratio, {where}", "largest / median norm", long, ratio))
        readings.append((f"Share of the mean token, {where}", "share of squared norm", common, share))
    every = "Of all rows together, not of windows."
    views = "Of what tells samples apart, relative to what tells their views apart."
    of_first = partial(_field_of, "first_token_share", None)
    return [
        *readings,
        ("Share of the first token", "share of squared norm", "Of each sequence.", of_first),
        ("Curvature", "degrees", curved, partial(_field_of, "curvature", "curvature_without_first")),
        ("RankMe", "effective rank", every, partial(_field_of, "rankme", "rankme_without_first")),
        ("LiDAR", "effective rank", views, partial(_field_of, "lidar", None)),
    ]


def _shape_of(window: int | None, name: str, layer: LayerProfile, first_token: bool) -> float | None:
    return _shape(layer, window, first_token, name)


def _field_of(name: str, without_first: str | None, layer: LayerProfile, first_token: bool) -> float | None:
    field_name = name if first_token else without_first
    value: float | None = None if field_name is None else getattr(layer, field_name)
    return value


def difference_panels(first: Profile, second: Profile) -> list[Panel]:
    """Second minus first, by layer."""
    found = []
    for window in (window for window in first.windows if window in second.windows):
        alpha = next(
            (order for order in (2.0, *first.orders) if order in first.orders and order in second.orders), None
        )
        if alpha is None:
            continue
        lines = []
        for kind, kind_name in KINDS.items():
            before, after = (
                [_entropy(layer, kind, alpha, window, True) for layer in one.layers] for one in (first, second)
            )
            lines.append(Line(kind_name, _differences(before, after), KIND_COLORS[kind]))
        found.append(
            Panel(
                f"Change of entropy, {window_name(window)}",
                "nats",
                "Second minus first. Where linear falls and centred cosine does not, only norms changed.",
                lines,
                first.names,
            )
        )
    return found


def draw_profile(profiles: Profile | Mapping[str, Profile], path: str | os.PathLike[str], *, title: str = "") -> Path:
    """Write a picture of a profile, or of several: entropies, norms, curvature and RankMe by layer.

    Needs matplotlib.

    >>> import torch
    >>> from gapt_optim.viewing import profile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> draw_profile(profile(model, [torch.randn(64, 4)], "1"), "profile.png").name
    'profile.png'
    """
    named = _named(profiles)
    shown = [panel for panel in panels(named) if panel.lines]
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        columns = min(2, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(5.2 * columns, 2.9 * rows))
        grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"hspace": 0.55, "wspace": 0.22})
        for axes, panel in zip(grid.ravel(), shown, strict=False):
            view = panel.views[0][0] if panel.views else None
            for line in panel.lines:
                if line.view == view:
                    values = [float("nan") if value is None else value for value in line.values]
                    style: dict[str, Any] = {"ls": "--" if line.dashed else "-", "lw": 1.6, "marker": "o", "ms": 2.5}
                    axes.plot(
                        range(len(values)), values, color=line.color, label="" if line.dashed else line.name, **style
                    )
            suffix = f": {panel.views[0][1]}" if panel.views else ""
            axes.set_title(f"{panel.title}{suffix}", loc="left", fontsize=10, fontweight="bold")
            axes.set_ylabel(panel.unit)
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y")
            low, high = axes.get_ylim()
            room = 0.06 * (max(high, 0) - min(low, 0))
            axes.set_ylim(min(low, 0) - room * (low < 0), max(high, 0) + room)  # small differences look small
            if sum(not line.dashed and line.view == view for line in panel.lines) > 1:
                axes.legend(fontsize=7, loc="best", framealpha=0.8, edgecolor="none")
        for axes in grid.ravel()[len(shown) :]:
            axes.set_visible(False)
        note = (
            "solid: all tokens, dashed: without the first token of each sequence"
            if any(line.dashed for panel in shown for line in panel.lines)
            else ""
        )
        top = figure.subplotpars.top + 0.5 / figure.get_figheight()
        figure.text(0.07, top, title or ", ".join(named), va="bottom", fontweight="bold", fontsize=13)
        figure.text(0.07, top, note, va="top", fontsize=8.5, color=FAINT)
        return save_figure(figure, path)


def write_profile(
    profiles: Profile | Mapping[str, Profile], path: str | os.PathLike[str], *, title: str = "Layers of a model"
) -> Path:
    """Write a self-contained HTML page of a profile, or of several with as many layers. Needs plotly.

    >>> import torch
    >>> from gapt_optim.viewing import profile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> write_profile(profile(model, [torch.randn(64, 4)], "1"), "profile.html").name
    'profile.html'

    Raises:
        ValueError: there is none, or their numbers of layers differ.
    """
    named = _named(profiles)
    if not named:
        raise ValueError("profiles is empty; pass at least one")
    counts = {name: len(one.layers) for name, one in named.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"profiles must have as many layers to be compared, found {counts}")
    several = len(named) > 1
    page = Page(title, _subtitle(named), [(name, COLORS[i % len(COLORS)]) for i, name in enumerate(named)])
    notes = [f"<b>{html.escape(name)}</b>: {html.escape(note)}" for name, one in named.items() for note in one.notes]
    if several and len({tuple(one.names) for one in named.values()}) > 1:
        notes.append("The layers have different names; they are compared by their place.")
    if notes:
        page.add("To know", bullets(notes))
    if several:
        first, *rest = named
        for other in rest:
            changes = difference_panels(named[first], named[other])
            heading = f"From {first} to {other}"
            said = f"Values of {other}, and their change from {first}."
            content = html_table(comparison_table(named[first], named[other]), said)
            page.add(heading, content, [_chart(panel) for panel in changes])
    entropies = [panel for panel in panels(named) if panel.title.startswith("Entropy")]
    others = [panel for panel in panels(named) if not panel.title.startswith("Entropy")]
    page.add("Entropy by layer", f"<p>{_READING}</p>", [_chart(panel) for panel in entropies])
    page.add("What can hide in an entropy, and more", "", [_chart(panel) for panel in others])
    for name, one in named.items():
        heading = f"Table: {name}" if several else "Table"
        page.add(heading, html_table(profile_table(one), "Order 2, all tokens, unless said."))
    return page.write(path)


_READING = (
    "The matrix-based entropy of each window&#8217;s tokens, in nats: 0 when all point the same way, the "
    "logarithm of their number "
    "when they spread evenly. The linear kernel weighs tokens by their length, so one long token can empty it; "
    "the cosine kernel "
    "does not. Centring takes off what all tokens share. Compare the four before concluding anything."
)


def profile_table(one: Profile) -> DataFrame:
    """A row per layer: what a terminal shows."""
    window = 8 if 8 in one.windows else one.windows[0]
    alpha = 2.0 if 2.0 in one.orders else one.orders[0]
    columns = ["layer", *(f"{name} S" for name in KINDS.values()), "rank", "norm ratio", "mean share"]
    rows: list[list[object]] = []
    for layer in one.layers:
        entropies = [_entropy(layer, kind, alpha, window, True) for kind in KINDS]
        best = layer.entropy("cosine", True, alpha=alpha, window=window)
        row: list[object] = [layer.name, *(_fixed(value) for value in entropies), number(best.effective_rank)]
        row += [number(_shape(layer, window, True, name)) for name in ("norm_ratio", "mean_share")]
        row += [
            number(layer.first_token_share),
            number(layer.curvature),
            number(layer.rankme, 4),
            number(layer.lidar, 4),
        ]
        rows.append(row)
    columns += ["first token", "curvature", "RankMe", "LiDAR"]
    return _without_empty(columns, rows)


def comparison_table(first: Profile, second: Profile) -> DataFrame:
    """A row per layer: the second's values, and their difference from the first's.

    Raises:
        ValueError: the numbers of layers differ, or no window and order is in both.
    """
    if len(first.layers) != len(second.layers):
        raise ValueError(
            f"the profiles have {len(first.layers)} and {len(second.layers)} layers and cannot be compared by layer"
        )
    windows = [window for window in (8, *first.windows) if window in first.windows and window in second.windows]
    orders = [order for order in (2.0, *first.orders) if order in first.orders and order in second.orders]
    if not windows or not orders:
        raise ValueError(
            "the profiles have no window and order in common; profile both with the same --windows and --orders"
        )
    columns = ["layer"]
    for name in ("cosine, centred S", "linear S", "norm ratio", "mean share", "curvature", "RankMe"):
        columns += [name, "change"]
    rows: list[list[object]] = []
    for before, after in zip(first.layers, second.layers, strict=True):
        name = before.name if before.name == after.name else f"{before.name} / {after.name}"
        row: list[object] = [name]
        readers: list[Callable[[LayerProfile], float | None]] = [
            lambda layer: _entropy(layer, ("cosine", True), orders[0], windows[0], True),
            lambda layer: _entropy(layer, ("linear", False), orders[0], windows[0], True),
            lambda layer: _shape(layer, windows[0], True, "norm_ratio"),
            lambda layer: _shape(layer, windows[0], True, "mean_share"),
            lambda layer: layer.curvature,
            lambda layer: layer.rankme,
        ]
        for read in readers:
            a, b = read(before), read(after)
            row += [number(b, 4), MISSING if a is None or b is None else _signed(b - a)]
        rows.append(row)
    return _without_empty(columns, rows)


def summary_line(one: Profile) -> str:
    """What the profile is of, in a line."""
    of_data = f" on {one.data}" if one.data else ""
    return (
        f"{one.model}{of_data}: {len(one.layers)} layers, {one.rows:,} rows in {one.sequences:,} sequences, "
        f"{one.batches:,} batches, {one.seconds:.1f} s"
    )


def _chart(panel: Panel) -> Chart:
    ticks = list(range(len(panel.layers)))
    traces = [_trace(line, ticks) for line in panel.lines]
    if any(line.dashed for line in panel.lines):
        traces += [_key(name, dash) for name, dash in (("all tokens", "solid"), ("without first token", "dash"))]
    every = max(1, -(-len(ticks) // 12))
    prefix = common_prefix(panel.layers)
    layout = base_layout(
        showlegend=len(traces) > 1,
        legend={"orientation": "h", "y": -0.28, "yanchor": "top", "x": 0, "font": {"size": 11}},
        hovermode="x unified",
        margin={"b": 30},
        xaxis={
            "range": [-0.3, len(ticks) - 0.7],
            "title": {"text": "layer", "standoff": 6},
            "tickmode": "array",
            "tickvals": ticks[::every],
            "ticktext": [label(name.removeprefix(prefix)) for name in panel.layers][::every],
        },
        # From 0, so that small differences look small.
        yaxis={"title": {"text": label(panel.unit), "standoff": 4}, "rangemode": "tozero"},
    )
    known = [line for line in panel.lines if any(value is not None for value in line.values)]
    said = "; ".join(f"{line.name} from {number(line.values[0])} to {number(line.values[-1])}" for line in known)
    alternative = f"{panel.title} over {len(ticks)} layers, in {panel.unit}: {said}."
    return Chart(panel.title, panel.note, alternative, traces, layout, panel.views, tall=True)


def _trace(line: Line, ticks: list[int]) -> Trace:
    meta = {key: value for key, value in (("run", line.run), ("view", line.view)) if value is not None}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": ticks,
        "y": np.array(line.values, dtype=np.float32),
        "name": label(line.name),
        "showlegend": not line.dashed,
        "line": {"color": line.color, "width": 2, "dash": "dash" if line.dashed else "solid"},
        "marker": {"size": 5, "color": line.color},
        "hovertemplate": "%{y:.4g}<extra>" + label(line.name) + "</extra>",
        "meta": meta,
    }


def _key(name: str, dash: str) -> Trace:
    """An entry of the legend without a line."""
    line = {"color": FAINT, "width": 2, "dash": dash}
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [None],
        "y": [None],
        "name": name,
        "line": line,
        "showlegend": True,
    }


def _named(profiles: Profile | Mapping[str, Profile]) -> dict[str, Profile]:
    return {profiles.model or "model": profiles} if isinstance(profiles, Profile) else dict(profiles)


def _subtitle(named: Mapping[str, Profile]) -> str:
    return "; ".join(
        summary_line(one) if len(named) == 1 else f"{name}: {summary_line(one)}" for name, one in named.items()
    )


def _entropy(
    layer: LayerProfile, kind: tuple[str, bool], alpha: float, window: int | None, first_token: bool
) -> float | None:
    try:
        return layer.entropy(*kind, alpha=alpha, window=window, first_token=first_token).nats
    except KeyError:
        return None


def _shape(layer: LayerProfile, window: int | None, first_token: bool, name: str) -> float | None:
    try:
        value: float | None = getattr(layer.shape(window=window, first_token=first_token), name)
    except KeyError:
        return None
    return value


def _differences(before: list[float | None], after: list[float | None]) -> list[float | None]:
    return [None if a is None or b is None else b - a for a, b in zip(before, after, strict=True)]


def _fixed(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")


def _without_empty(columns: list[str], rows: list[list[object]]) -> DataFrame:
    """The first column names the rows; columns without a value go."""
    keep = [i for i in range(1, len(columns)) if any(row[i] != MISSING for row in rows)]
    cells = [[row[i] for i in keep] for row in rows]
    return DataFrame(cells, index=[str(row[0]) for row in rows], columns=[columns[i] for i in keep])
