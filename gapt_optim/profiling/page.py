"""One self-contained page of a profile, or of several."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._display.page import Chart, Page, Trace, base_layout, bullets, label
from .._display.tables import html_table, number
from .charts import (
    COLORS,
    WITHOUT_FIRST,
    Heat,
    Panel,
    entropy_panels,
    norms_by_position,
    other_panels,
    over_profiles,
    short_names,
    similarity,
)
from .comparison import Comparison, compare
from .results import Profile
from .tables import by_prompt, longest_tokens, profile_table, summary_line, summary_of_several, what_is_shown

_READING = (
    "The matrix-based entropy of each window&#8217;s tokens, in nats: 0 when all point the same way, the logarithm of "
    "their number when they spread evenly. The linear kernel weighs tokens by their length, so one long token can "
    "empty it; the cosine kernel does not. Centring takes off what all tokens share. Compare the four before "
    "concluding anything."
)


def write_profile(
    profiles: Profile | Mapping[str, Profile] | Comparison,
    path: str | os.PathLike[str],
    *,
    title: str = "Layers of a model",
) -> Path:
    """Write a self-contained HTML page of a profile, or of several that can be compared. Needs plotly and pandas.

    >>> import torch
    >>> from gapt_optim.profiling import profile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> write_profile(profile(model, [torch.randn(64, 4)], "1"), "profile.html").name
    'profile.html'

    Raises:
        ValueError: there is none, or they cannot be compared (:func:`gapt_optim.compare`).
    """
    found = profiles
    if isinstance(found, Mapping):
        if not found:
            raise ValueError("profiles is empty; pass at least one")
        found = compare(found) if len(found) > 1 else next(iter(found.values()))
    if isinstance(found, Comparison):
        return _page_of_several(found, title).write(path)
    return _page_of_one(found, title).write(path)


def _page_of_one(one: Profile, title: str) -> Page:
    named = {one.model or "model": one}
    page = Page(title, summary_line(one), [(name, COLORS[0]) for name in named])
    if one.notes:
        page.add("To know", bullets([html.escape(note) for note in one.notes]))
    page.add("Entropy by layer", f"<p>{_READING}</p>", [_chart(panel) for panel in entropy_panels(named)])
    page.add("What can hide in an entropy, and more", "", [_chart(panel) for panel in other_panels(named)])
    heats = [heat for heat in (similarity(one), norms_by_position(one)) if heat is not None]
    if heats:
        page.add("Which layers are alike, and where their length lies", "", [_heat(heat) for heat in heats])
    longest = longest_tokens(one)
    if any(layer.longest for layer in one.layers):
        page.add("Longest tokens and largest channels", html_table(longest))
    prompts = by_prompt(one)
    if len(prompts) > 1:
        page.add("By sequence", html_table(prompts, "Entropies of the longest windows, in nats."))
    page.add("Table", html_table(profile_table(one), " ".join(what_is_shown(one)[:1])))
    return page


def _page_of_several(found: Comparison, title: str) -> Page:
    profiles = found.profiles
    page = Page(
        title, summary_of_several(profiles), [(name, COLORS[i % len(COLORS)]) for i, name in enumerate(profiles)]
    )
    notes = [html.escape(warning) for warning in found.warnings]
    notes += [
        f"<b>{html.escape(name)}</b>: {html.escape(note)}" for name, one in profiles.items() for note in one.notes
    ]
    if notes:
        page.add("To know", bullets(notes))
    if len(profiles) == 2:
        before, after = profiles
        page.add(f"From {before} to {after}", html_table(found.to_pandas(), f"Values of {after}, and their change."))
    else:
        page.add("Over the profiles", "", [_heat(over_profiles(found))])
    page.add("Entropy by layer", f"<p>{_READING}</p>", [_chart(panel) for panel in entropy_panels(profiles)])
    page.add("What can hide in an entropy, and more", "", [_chart(panel) for panel in other_panels(profiles)])
    for name, one in profiles.items():
        heats = [heat for heat in (similarity(one),) if heat is not None] if len(profiles) == 2 else []
        page.add(
            name, html_table(profile_table(one), " ".join(what_is_shown(one)[:1])), [_heat(heat) for heat in heats]
        )
    return page


def _chart(panel: Panel) -> Chart:
    ticks = list(range(len(panel.layers)))
    traces: list[Trace] = []
    for line in panel.lines:
        meta = {"run": line.run, "view": line.view}
        trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "x": ticks,
            "y": line.values,
            "name": label(line.name),
            "showlegend": not line.dashed and line.run is None,  # the page's head has the colours of several
            "line": {"color": line.color, "width": 2, "dash": "dash" if line.dashed else "solid"},
            "marker": {"size": 5, "color": line.color},
            "hovertemplate": "%{y:.4g}<extra>" + label(line.name) + "</extra>",
            "meta": {key: value for key, value in meta.items() if value is not None},
        }
        if line.errors is not None and any(line.errors):
            trace["error_y"] = {"type": "data", "array": line.errors, "thickness": 1, "width": 2}
        traces.append(trace)
    if any(line.dashed for line in panel.lines):
        grey = {"color": "#7d8590", "width": 2, "dash": "dash"}
        traces.append({"type": "scatter", "mode": "lines", "x": [0], "y": [None], "name": WITHOUT_FIRST, "line": grey})
    low, high = panel.bounds()
    for name, limit in panel.limits:
        if low <= limit <= high:
            dotted = {"color": "#7d8590", "width": 1.2, "dash": "dot"}
            span = [-0.3, len(ticks) - 0.7]
            traces.append(
                {"type": "scatter", "mode": "lines", "x": span, "y": [limit, limit], "name": label(name),
                 "line": dotted, "hoverinfo": "skip"}
            )  # fmt: skip
    every = max(1, -(-len(ticks) // 12))
    layout = base_layout(
        showlegend=len(traces) > 1,
        legend={"orientation": "h", "y": -0.24, "yanchor": "top", "x": 0, "font": {"size": 11}},
        hovermode="x unified",
        margin={"b": 30},
        xaxis={
            "range": [-0.3, len(ticks) - 0.7],
            "title": {"text": "layer", "standoff": 6},
            "tickmode": "array",
            "tickvals": ticks[::every],
            "ticktext": [label(name) for name in short_names(panel.layers)][::every],
        },
        yaxis={"title": {"text": label(panel.unit), "standoff": 4}, "range": [low, high]},
    )
    said = "; ".join(f"{line.name} from {number(line.values[0])} to {number(line.values[-1])}" for line in panel.lines)
    alternative = f"{panel.title} over {len(ticks)} layers, in {panel.unit}: {said}."
    return Chart(panel.title, panel.note, alternative, traces, layout, panel.views, tall=True)


def _heat(heat: Heat) -> Chart:
    traces: list[Trace] = []
    for name, rows in heat.values.items():
        trace: dict[str, Any] = {
            "type": "heatmap",
            "x": [label(text) for text in heat.x],
            "y": [label(text) for text in heat.y],
            "z": rows,
            "colorscale": "Viridis",
            "colorbar": {"thickness": 10, "title": {"text": label(heat.unit)}},
            "hovertemplate": "%{y}<br>%{x}: %{z:.4g}<extra></extra>",
            "meta": {"view": name} if name else {},
        }
        if heat.bounds is not None:
            trace |= {"zmin": heat.bounds[0], "zmax": heat.bounds[1]}
        traces.append(trace)
    names = {"y": short_names(heat.y), "x": short_names(heat.x) if "layer" in heat.x_title else heat.x}
    axes = {}
    for axis, texts in names.items():
        every = max(1, -(-len(texts) // 14))
        places = list(range(len(texts)))[::every]
        axes[axis] = {"tickmode": "array", "tickvals": places, "ticktext": [label(texts[i]) for i in places]}
    layout = base_layout(
        hovermode="closest",
        xaxis={"title": {"text": heat.x_title, "standoff": 6}, "type": "category", "showgrid": False, **axes["x"]},
        yaxis={"title": {"text": "layer", "standoff": 4}, "type": "category", "showgrid": False, **axes["y"]},
    )
    alternative = f"{heat.title}: {len(heat.y)} layers by {len(heat.x)}. The table has the numbers."
    views = [(name, name) for name in heat.values] if len(heat.values) > 1 else []
    return Chart(heat.title, heat.note, alternative, traces, layout, views, tall=True)
