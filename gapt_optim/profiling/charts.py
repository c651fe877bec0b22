"""What there is to see of profiles: lines over the layers, and heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pandas import DataFrame

from .._display.page import Chart, Trace, base_layout, heat_trace, label, line_trace
from .._display.pictures import OTHER_COLORS
from .._display.tables import number, shared_start, short_names
from .comparison import Comparison
from .results import Profile
from .tables import (
    KINDS,
    WITHOUT_FIRST,
    entropy_column,
    every_number,
    figures,
    kinds_of,
    main_order,
    poolings,
    window_name,
)

COLORS = ("#1f6feb", "#d9822b", *OTHER_COLORS, "#8250df")
GREY = "#7d8590"
DASHED = "dashed: without first tokens"


Line = tuple[str, Trace]
"""A line over the layers, with its name as it is: a trace has it for plotly."""


class ProfileCharts:
    """Charts of one profile, or of several with the same layers."""

    def __init__(self, profiles: Mapping[str, Profile]) -> None:
        self.profiles = profiles
        self.first = next(iter(profiles.values()))
        self.numbers = {name: every_number(one) for name, one in profiles.items()}
        self.several = len(profiles) > 1

    def entropies(self) -> list[Chart]:
        """Entropies by window: of one profile a line for each kernel, of several a view for each."""
        alpha, found = main_order(self.first), []
        for window in self.first.windows:
            lines = []
            for place, kind in enumerate(kinds_of(self.first)):
                column, name = entropy_column(kind, alpha, window), KINDS[kind]
                lines += self._lines(column, name=name, place=place)
            views = [(KINDS[kind], f"{KINDS[kind]} kernel") for kind in kinds_of(self.first)] if self.several else []
            order = "" if alpha == 2 else f", order {alpha:g}"
            note, limits = "Bars are standard errors over sequences.", self._entropy_limits(window)
            found.append(self._chart(f"Entropy, {window_name(window)}{order}", "nats", note, lines, limits, views))
        return found

    def others(self) -> list[Chart]:
        """What can hide in an entropy, ranks, and one row for each sequence."""
        long = "A few long tokens lower the linear entropy by themselves."
        common = "One vector that all tokens share lowers what is not centred."
        found = []
        for window in self.first.windows:
            where = window_name(window)
            ratios, shares = self._lines(f"norm ratio, {where}"), self._lines(f"mean share, {where}")
            found.append(self._chart(f"Norm ratio, {where}", "largest / median norm", long, ratios))
            found.append(self._chart(f"Share of the mean token, {where}", "share of squared norm", common, shares))
        few = " Fewer than ten rows per feature: more rows alone would raise it."
        ranked = "Of all rows together, not of windows." + few * any(layer.few_rows for layer in self.first.layers)
        features = max(layer.features for layer in self.first.layers)
        most = [(f"{features} features", float(features))]
        chance = [("independent tokens", 120.0), ("random walk", 90.0)]
        bent = "Mean angle between successive steps from token to token."
        share = self._lines("first_token_share")
        found += [
            self._chart("RankMe", "effective rank", ranked, self._lines("rankme"), most),
            self._chart("Curvature", "degrees", bent, self._lines("curvature"), chance),
            self._chart("Share of the first token", "share of squared norm", "Of each sequence.", share),
        ]
        rows = max((level.rows for layer in self.first.layers for level in layer.sequence_level), default=0)
        note = f"One row for each of {rows:,} sequences: how many directions the sequences of the data use."
        for title, unit, column in (("entropy", "nats", "S"), ("RankMe", "effective rank", "RankMe")):
            lines, views = [], []
            for place, pooling in enumerate(poolings(self.first)):
                said = "samples" if pooling == "sample" else f"{pooling} token"
                lines += self._lines(f"sequence level, {pooling}, {column}", name=said, place=place)
                views.append((said, said))
            found.append(self._chart(f"Sequence level: {title}", unit, note, lines, (), views if self.several else ()))
        return [chart for chart in found if chart.traces]

    def _lines(self, column: str, *, name: str = "", place: int = 0) -> list[Line]:
        """A column of each profile, dashed without first tokens; ``name`` is that of a view where there are several."""
        errors = f"{column}, error"
        found: list[Line] = []
        for i, (profile, numbers) in enumerate(self.numbers.items()):
            for each in (column, column + WITHOUT_FIRST, f"{column}_without_first"):
                if each not in numbers or numbers[each].isna().all():
                    continue
                dashed = each != column
                said = profile if self.several else name or ("without first token" if dashed else "all tokens")
                said += WITHOUT_FIRST if dashed and (self.several or name) else ""
                color = COLORS[(i if self.several else place) % len(COLORS)]
                meta: dict[str, Any] = {"run": i} if self.several else {}
                if self.several and name:
                    meta["view"] = name
                trace = line_trace(
                    list(range(len(numbers))), numbers[each].astype(float).tolist(), said, color,
                    dash="dash" if dashed else "solid", mode="lines+markers", marker={"size": 5, "color": color},
                    showlegend=not dashed and not self.several,  # the page's head has the colours of several
                    meta=meta,
                )  # fmt: skip
                if errors in numbers and not dashed and numbers[errors].notna().any():
                    bars = numbers[errors].astype(float).tolist()
                    trace["error_y"] = {"type": "data", "array": bars, "thickness": 1, "width": 2}
                found.append((said, trace))
        return found

    def _entropy_limits(self, window: int | None) -> list[tuple[str, float]]:
        if window is None:
            return []
        most = min(window, max(layer.features for layer in self.first.layers))
        centered = any(kind[1] for kind in kinds_of(self.first))
        return [(f"centred at most log {most - 1}", math.log(most - 1))] if centered and most > 2 else []

    def _chart(
        self,
        title: str,
        unit: str,
        note: str,
        lines: list[Line],
        limits: Sequence[tuple[str, float]] = (),
        views: Sequence[tuple[str, str]] = (),
    ) -> Chart:
        """Lines over the layers. The axis is fitted to them; of the limits, those that are near are shown too."""
        names = self.first.names
        traces = [trace for _, trace in lines]
        dashed = any(trace["line"]["dash"] == "dash" for trace in traces)
        if dashed:
            traces.append(line_trace([0], [None], DASHED, GREY, dash="dash"))
        low, high = _bounds([value for _, trace in lines for value in trace["y"] if math.isfinite(value)], limits)
        across = [-0.3, len(names) - 0.7]
        for name, limit in limits if lines else ():
            if low <= limit <= high:
                traces.append(line_trace(across, [limit, limit], name, GREY, width=1.2, dash="dot", hoverinfo="skip"))
        layout = base_layout(
            showlegend=len(traces) > 1,
            legend={"orientation": "h", "y": -0.24, "yanchor": "top", "x": 0, "font": {"size": 11}},
            hovermode="x unified",
            margin={"b": 30},
            xaxis={"range": across, "title": {"text": "layer", "standoff": 6}, **_ticks(short_names(names), 12)},
            yaxis={"title": {"text": label(unit), "standoff": 4}, "range": [low, high]},
        )
        ends = "; ".join(f"{name} from {number(line['y'][0])} to {number(line['y'][-1])}" for name, line in lines)
        near = "; ".join(f"{name}: {number(value)}" for name, value in limits)
        said = [note, f"{DASHED.capitalize()}." if dashed else "", f"Dotted where near: {near}." if limits else ""]
        alternative = f"{title} over {len(names)} layers, in {unit}: {ends}."
        return Chart(title, " ".join(filter(None, said)), alternative, traces, layout, views, tall=True)


def similarity(one: Profile) -> list[Chart]:
    """CKA between the layers of a model, or with those of the model it was compared against."""
    if one.cka is None:
        return []
    mark = "against: "
    matrix = DataFrame(one.cka, index=one.cka_names, columns=one.cka_names)
    other = [name for name in one.cka_names if name.startswith(mark)]
    shown = matrix.drop(index=other)[other or list(one.cka_names)].rename(columns=lambda name: name.removeprefix(mark))
    note = "1 where two layers hold the same up to rotation and one scale, 0 where they share nothing. Linear kernel."
    title = "CKA with the other model" if other else "CKA between layers"
    return [_heat(title, "CKA", note, {"": shown}, "layer of the other" if other else "layer", zmin=0.0, zmax=1.0)]


def norms_by_position(one: Profile) -> list[Chart]:
    """Mean norms by layer and position, relative to those of the last positions."""
    frame = DataFrame([dict(layer.norm_by_position) for layer in one.layers], index=one.names).sort_index(axis=1)
    if frame.empty:
        return []
    edges = list(frame)
    frame = frame.div(frame.ffill(axis=1).iloc[:, -1], axis=0)
    ends = [*edges[1:], edges[-1] + 1]
    frame.columns = [f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in zip(edges, ends, strict=True)]
    if edges[-1] >= 4:
        frame.columns = [*frame.columns[:-1], f"{edges[-1]} on"]
    note = "Mean norm of the tokens at a position over that of the last ones. First tokens that are long are sinks."
    return [_heat("Norm by position", "ratio", note, {"": frame}, "position in the sequence")]


def over_profiles(found: Comparison) -> Chart:
    """Each number of the tables by layer and profile: how layers develop over the checkpoints of a run."""
    units = {figure.title: figure.unit for figure in figures(next(iter(found.profiles.values())))}
    start = shared_start(list(found.profiles))
    frames = {
        f"{title} ({units[title]})": frame.rename(columns=lambda name: name.removeprefix(start))
        for title, frame in found.over_profiles().items()
    }
    axis = f"profile {start}*" if start else "profile"
    return _heat("Layers over profiles", "", "A column for each profile.", frames, axis)


def _bounds(values: list[float], limits: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """An axis fitted to the data; a limit that is near is on it too."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) or abs(high) or 1.0
    for _, limit in limits:
        if low - 0.5 * room <= limit <= high + 0.5 * room:
            low, high = min(low, limit), max(high, limit)
    edge = 0.06 * ((high - low) or abs(high) or 1.0)
    return low - edge, high + edge


def _heat(title: str, unit: str, note: str, frames: Mapping[str, DataFrame], x_title: str, **more: Any) -> Chart:
    """A heat map with a row for each layer; of several frames, a select chooses one."""
    traces = [heat_trace(frame, unit, **more, meta={"view": name} if name else {}) for name, frame in frames.items()]
    frame = next(iter(frames.values()))
    x, y = list(frame.columns), short_names(list(frame.index))
    layout = base_layout(
        hovermode="closest",
        xaxis={"title": {"text": x_title, "standoff": 6}, "type": "category", "showgrid": False,
               **_ticks(short_names(x) if "layer" in x_title else x, 14)},
        yaxis={"title": {"text": "layer", "standoff": 4}, "type": "category", "showgrid": False, **_ticks(y, 14)},
    )  # fmt: skip
    alternative = f"{title}: {len(y)} layers by {len(x)}. The table has the numbers."
    views = [(name, name) for name in frames] if len(frames) > 1 else []
    return Chart(title, note, alternative, traces, layout, views, tall=True)


def _ticks(names: Sequence[str], most: int) -> dict[str, Any]:
    every = max(1, -(-len(names) // most))
    places = list(range(len(names)))[::every]
    return {"tickmode": "array", "tickvals": places, "ticktext": [label(names[i]) for i in places]}
