"""The charts of one run or several: over the steps, by phase, by layer, and of alignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .downsampling import MOST_POINTS, Points, band, extremes, heat_map, thinned
from .history import (
    Record,
    RunHistory,
    changes_of_sign,
    compression_spans,
    cosines_of,
    last_value,
    layer_rows,
    smoothed,
    switches_of,
    values_of,
)
from .page import Chart, Trace, base_layout, label, number, rounded

MEASURES = {
    "entropy": ("Matrix entropy", "nats"),
    "measures.linear_entropy": ("Linear entropy, not centred", "nats"),
    "measures.centered_cosine_entropy": ("Cosine entropy, centred", "nats"),
    "measures.norm_ratio": ("Norm ratio", "largest / median norm"),
    "measures.mean_share": ("Share of the mean token", "share of squared norm"),
    "entropy_share": ("Entropy's part of the objective, in compression", "share"),
}
"""What is drawn over steps beside the loss: key, title and unit."""

MEASURE_NOTES = {
    "entropy": "What the gate judges: the mean over the layers that count.",
    "measures.linear_entropy": "Falls when a few tokens grow long, so it proves nothing by itself.",
    "measures.centered_cosine_entropy": "Blind to token lengths and to a vector that all tokens share.",
    "measures.norm_ratio": "A rise means that a few tokens outweigh the others.",
    "measures.mean_share": "A rise means that all tokens share one large vector.",
    "entropy_share": "Weight times entropy over the whole objective.",
}

LAYER_MEASURES = {
    "entropy": "Matrix entropy (nats)",
    "linear_entropy": "Linear entropy (nats)",
    "centered_cosine_entropy": "Centred cosine entropy (nats)",
    "norm_ratio": "Norm ratio",
    "mean_share": "Share of the mean token",
}


class RunCharts:
    """Charts of runs, each with its seeds, in the order in which the page shows them.

    Args:
        runs: seeds of each run, by name.
        colors: of each run.
        end: the last step of all.
    """

    def __init__(self, runs: Mapping[str, Sequence[RunHistory]], colors: Sequence[str], end: int) -> None:
        self.runs, self.colors, self.end = runs, colors, end

    def _all(self) -> Iterable[RunHistory]:
        return (run for histories in self.runs.values() for run in histories)

    def over_steps(self) -> list[Chart]:
        charts = [self._line_chart("loss", "Loss", "nats", "Cross-entropy of the training steps and of held-out data.")]
        for key, (name, unit) in MEASURES.items():
            if any(values_of(run.steps, key) or values_of(run.validations, key) for run in self._all()):
                charts.append(self._line_chart(key, name, unit, MEASURE_NOTES[key]))
        return charts

    def _line_chart(self, key: str, title: str, unit: str, note: str) -> Chart:
        data: list[Trace] = []
        rows: list[list[object]] = []
        late: list[float] = []
        for i, (name, histories) in enumerate(self.runs.items()):
            trained = [values_of(run.steps, key) for run in histories]
            held_out = [values_of(run.validations, key) for run in histories]
            data += self._lines(i, name, trained, faint=any(held_out))
            data += self._held_out_lines(i, name, held_out)
            points = [point for points in (*trained, *held_out) for point in points]
            late += [value for step, value in points if step >= 0.1 * self.end]
            ends = finals(histories, key)
            firsts = [points[0][1] for points in trained if points]
            lows = [min(value for _, value in points) for points in trained if points]
            rows.append([name, plain_mean(firsts), plain_mean(lows), plain_mean(ends)])
        data += self._phase_traces(markers=key in ("loss", "entropy"))
        layout = self._step_layout(unit)
        if key == "loss" and late and min(late) < max(late):
            room = 0.06 * (max(late) - min(late))
            layout["yaxis"]["range"] = [min(late) - room, max(late) + room]
        else:
            layout["yaxis"]["rangemode"] = "tozero"
        columns = ["run", "first", "lowest", "last"]
        said = "; ".join(f"{row[0]} from {row[1]} to {row[3]}" for row in rows)
        return Chart(
            title,
            note,
            f"{title} over {self.end:,} steps, in {unit}: {said}.",
            data,
            layout,
            columns,
            rows,
            group="steps",
        )

    def _lines(self, i: int, name: str, seeds: list[Points], faint: bool) -> list[Trace]:
        seeds = [points for points in seeds if points]
        if not seeds:
            return []
        color, meta = self.colors[i], {"run": i}
        if len(seeds) > 1:
            steps, low, mean, high = band([smoothed(points) for points in seeds], MOST_POINTS)
            edge = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "meta": meta}
            return [
                {**edge, "x": steps, "y": rounded(low)},
                {**edge, "x": steps, "y": rounded(high), "fill": "tonexty", "fillcolor": _clear(color, 0.18)},
                _line(steps, mean, f"{name}, mean of {len(seeds)}", color, meta),
            ]
        (points,) = seeds
        raw = extremes(points, MOST_POINTS)
        traces = [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [step for step, _ in raw],
                "y": rounded(value for _, value in raw),
                "line": {"color": color, "width": 0.8},
                "opacity": 0.35,
                "hoverinfo": "skip",
                "meta": meta,
            }
        ]
        steps, values = _unzipped(thinned(smoothed(points), MOST_POINTS))
        mean_line = _line(steps, values, f"{name}, training" if faint else name, color, meta)
        if faint:
            mean_line["line"]["width"] = 1.2
            mean_line["opacity"] = 0.6
        if len(points) < points[-1][0] - points[0][0]:  # not of every step, as the entropy's part of the objective
            mean_line |= {"mode": "markers", "marker": {"size": 3, "color": color}}
            return [mean_line]
        return [*traces, mean_line]

    def _held_out_lines(self, i: int, name: str, seeds: list[Points]) -> list[Trace]:
        seeds = [points for points in seeds if points]
        if not seeds:
            return []
        color, meta = self.colors[i], {"run": i}
        if len(seeds) > 1:
            steps, low, mean, high = band(seeds, MOST_POINTS)
            edge = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "meta": meta}
            return [
                {**edge, "x": steps, "y": rounded(low)},
                {**edge, "x": steps, "y": rounded(high), "fill": "tonexty", "fillcolor": _clear(color, 0.18)},
                _line(steps, mean, f"{name}, held out, mean of {len(seeds)}", color, meta),
            ]
        steps, values = _unzipped(extremes(seeds[0], MOST_POINTS))
        line = _line(steps, values, f"{name}, held out", color, meta)
        line["mode"] = "lines+markers" if len(steps) <= 60 else "lines"
        line["marker"] = {"size": 6, "color": color}
        return [line]

    def _step_layout(self, unit: str) -> dict[str, Any]:
        return base_layout(
            xaxis={"range": [0, self.end], "rangemode": "nonnegative"},
            yaxis={"title": {"text": label(unit), "standoff": 4}, "overlaying": "y2", "tickmode": "auto"},
            # Phases lie behind the lines, over the whole height.
            yaxis2={"range": [0, 1], "visible": False, "fixedrange": True},
        )

    def _phase_traces(self, *, markers: bool) -> list[Trace]:
        traces: list[Trace] = []
        for i, histories in enumerate(self.runs.values()):
            spans = compression_spans(histories[0].steps)
            if not spans:
                continue
            traces.append(_shade(spans, {"run": i, "phases": i, "role": "shade"}))
            switches = switches_of(histories[0].steps)
            if not markers or not switches:
                continue
            up = [phase == "compression" for _, phase, _ in switches]
            traces.append(
                {
                    "type": "scattergl" if len(switches) > 2000 else "scatter",
                    "mode": "markers",
                    "x": [step for step, _, _ in switches],
                    "y": [0.97 if rises else 0.93 for rises in up],
                    "yaxis": "y2",
                    "marker": {"size": 8, "symbol": ["triangle-right" if rises else "triangle-left" for rises in up]},
                    "text": [label(f"{reason}: {phase} from step {step + 1:,}") for step, phase, reason in switches],
                    "hovertemplate": "%{text}<extra></extra>",
                    "meta": {"run": i, "phases": i, "role": "switch"},
                }
            )
        return traces

    def phases(self) -> list[Chart]:
        names = [label(name) for name in self.runs]
        shares = [
            fmean([share_in_compression(run.steps) for run in histories] or [0.0]) for histories in self.runs.values()
        ]
        data: list[Trace] = []
        for part, values, color in (
            ("compression", shares, "#1f6feb"),
            ("memorization", [1 - share for share in shares], "#8b949e"),
        ):
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "y": names,
                    "x": rounded(100 * value for value in values),
                    "name": part,
                    "marker": {"color": color},
                    "text": [f"{value:.0%}" if value >= 0.08 else "" for value in values],
                    "textposition": "inside",
                    "insidetextanchor": "middle",
                    "textfont": {"color": "#ffffff"},
                    "hovertemplate": "%{y}: %{x:.1f} % " + part + "<extra></extra>",
                }
            )
        layout = base_layout(
            barmode="stack",
            showlegend=True,
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
            hovermode="closest",
            dragmode=False,
            margin={"t": 36},
            xaxis={"range": [0, 100], "title": {"text": "% of steps", "standoff": 6}, "fixedrange": True},
            yaxis={"autorange": "reversed", "type": "category", "fixedrange": True},
        )
        rows: list[list[object]] = []
        for (name, histories), share in zip(self.runs.items(), shares, strict=True):
            spans = [end - begin + 1 for run in histories for begin, end in compression_spans(run.steps)]
            reasons = [reason for run in histories for _, _, reason in switches_of(run.steps)]
            counted = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)) or "none"
            longest = f"{max(spans):,}" if spans else number(None)
            rows.append([name, f"{share:.1%}", len(spans), longest, counted])
        said = "; ".join(f"{row[0]} {row[1]}" for row in rows)
        columns = ["run", "in compression", "phases", "longest", "switches by reason"]
        alternative = f"Share of steps in compression: {said}."
        return [
            Chart(
                "Share of steps in each phase", "Means over seeds.", alternative, data, layout, columns, rows, wide=True
            )
        ]

    def layer_maps(self) -> list[Chart]:
        charts = []
        available = {
            key: text
            for key, text in LAYER_MEASURES.items()
            if any(layer_rows(histories[0], key) for histories in self.runs.values())
        }
        limits: dict[str, tuple[float, float]] = {}
        maps: dict[tuple[int, str], tuple[list[float], list[str], list[list[float | None]]]] = {}
        for key in available:
            every: list[float] = []
            for i, histories in enumerate(self.runs.values()):
                if rows := layer_rows(histories[0], key):
                    maps[i, key] = heat_map(rows)
                    every += [value for row in maps[i, key][2] for value in row if value is not None]
            every.sort()
            high = every[int(0.995 * (len(every) - 1))] if every else 1.0
            limits[key] = (1.0 if key == "norm_ratio" else 0.0, high)
        for i, (name, histories) in enumerate(self.runs.items()):
            shown = [key for key in available if (i, key) in maps]
            if not shown:
                continue
            data: list[Trace] = [
                _heat(*maps[i, key], limits[key], available[key], {"run": i, "view": key}) for key in shown
            ]
            rows = layer_rows(histories[0], shown[0])
            first, last = rows[0][1], rows[-1][1]
            table_rows = [[layer, first.get(layer), last.get(layer)] for layer in last]
            views = [(key, available[key]) for key in shown]
            lowest = min(last, key=lambda layer: _or_inf(last[layer]), default="")
            alternative = (
                f"Heat map of {len(last)} layers over the steps of {name}. At the end the lowest "
                f"{available[shown[0]]} is "
                f"{number(last.get(lowest))}, in {lowest}."
            )
            seed = ", first seed" if len(histories) > 1 else ""
            charts.append(
                self._map_chart(i, f"{name}{seed}", data, alternative, views, histories[0], table_rows, len(last))
            )
        return charts

    def _map_chart(
        self,
        i: int,
        title: str,
        data: list[Trace],
        alternative: str,
        views: list[tuple[str, str]],
        run: RunHistory,
        rows: Sequence[Sequence[object]],
        layers: int,
    ) -> Chart:
        spans = compression_spans(run.steps)
        end = max((record["step"] for record in run.steps), default=self.end)
        strip: list[Trace] = []
        for role, boxes in (("ground", [(1, end)]), ("strip", spans)):
            if boxes:
                strip.append(_shade(boxes, {"run": i, "role": role}))
        layout = base_layout(
            hovermode="closest",
            xaxis={"range": [0, self.end]},
            yaxis={"domain": [0, 0.93], "autorange": "reversed", "type": "category", "ticks": "", "showgrid": False},
            yaxis2={"domain": [0.95, 1], "range": [0, 1], "visible": False, "fixedrange": True},
        )
        note = "One row per layer." if len(views) < 2 else "One row per layer; choose what is shown."
        return Chart(
            title, note, alternative, [*data, *strip], layout, ["layer", "first", "last"], rows,
            views if len(views) > 1 else (), group="steps", tall=layers > 8, run=i,
        )  # fmt: skip

    def alignment(self) -> list[Chart]:
        data: list[Trace] = []
        rows: list[list[object]] = []
        for i, (name, histories) in enumerate(self.runs.items()):
            at_layers = [cosines_of(run.steps, "alignment") for run in histories]
            of_parameters = [cosines_of(run.steps, "parameter_alignment") for run in histories]
            data += self._lines(i, name, at_layers, faint=False)
            points = [point for points in of_parameters for point in points]
            if points:
                steps, values = _unzipped(sorted(extremes(sorted(points), MOST_POINTS)))
                dots = _line(steps, values, f"{name}, of the parameters", self.colors[i], {"run": i})
                data.append({**dots, "mode": "markers", "marker": {"size": 5, "color": self.colors[i]}})
            if any(at_layers) or points:
                crossings = [step for points in at_layers for step in changes_of_sign(points)]
                rows.append([name, *_cosines_by_phase(histories), f"{len(crossings):,}"])
        if not data:
            return []
        layout = self._step_layout("cosine")
        layout["yaxis"] |= {"zeroline": True}
        columns = ["run", "mean in memorization", "mean in compression", "sign changes"]
        said = "; ".join(f"{row[0]} {row[1]} in memorization and {row[2]} in compression" for row in rows)
        charts = [
            Chart(
                "Cosine of the two gradients",
                "Lines: at the layers' outputs. Dots: of the parameters, on the steps that measure it.",
                f"Cosine between loss gradient and entropy gradient over the steps: {said}.",
                data + self._phase_traces(markers=False),
                layout,
                columns,
                rows,
                group="steps",
                wide=True,
            )
        ]
        for i, (name, histories) in enumerate(self.runs.items()):
            per_layer = layer_rows(histories[0], "cosine")
            if not per_layer:
                continue
            at, names, cells = heat_map(per_layer)
            every = sorted(abs(value) for row in cells for value in row if value is not None)
            limit = (every[int(0.98 * (len(every) - 1))] if every else 1.0) or 1.0
            trace = _heat(at, names, cells, (-limit, limit), "cosine", {"run": i}, colors="RdBu")
            trace["reversescale"] = True  # plotly's goes from blue to red
            counts = layer_signs(per_layer)
            title = f"Cosine at each layer, {name}"
            most = max(counts, key=lambda layer: counts[layer][1], default="")
            alternative = (
                f"Heat map of the cosine at {len(names)} layers of {name}; it changes its sign most often at {most}."
            )
            chart = self._map_chart(i, title, [trace], alternative, [], histories[0], (), len(names))
            chart.columns = ["layer", "mean cosine", "sign changes"]
            chart.rows = [[layer, mean, count] for layer, (mean, count) in counts.items()]
            chart.note = "Blue: the gradients agree. Red: they oppose each other."
            charts.append(chart)
        return charts


def _line(steps: Iterable[float], values: Iterable[float | None], name: str, color: str, meta: dict[str, Any]) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(steps),
        "y": rounded(values),
        "name": label(name),
        "line": {"color": color, "width": 2},
        "hovertemplate": "%{y:.4g}<extra>" + label(name) + "</extra>",
        "meta": meta,
    }


def _heat(
    steps: list[float],
    names: list[str],
    values: list[list[float | None]],
    limits: tuple[float, float],
    unit: str,
    meta: dict[str, Any],
    colors: str = "Viridis",
) -> Trace:
    return {
        "type": "heatmap",
        "x": steps,
        "y": [label(name) for name in names],
        "z": values,
        "zmin": limits[0],
        "zmax": limits[1] if limits[1] > limits[0] else limits[0] + 1,
        "colorscale": colors,
        "colorbar": {"thickness": 10, "len": 0.95, "y": 0.47, "outlinewidth": 0, "tickfont": {"size": 11}},
        "hovertemplate": "%{y}, step %{x:,}: %{z:.4g}<extra>" + label(unit) + "</extra>",
        "meta": meta,
    }


def _shade(spans: Sequence[tuple[float, float]], meta: dict[str, Any]) -> Trace:
    """A filled box per span, from the step before its first to its last."""
    x: list[float | None] = []
    y: list[float | None] = []
    for first, last in spans:
        x += [first - 1, first - 1, last, last, first - 1, None]
        y += [0, 1, 1, 0, 0, None]
    return {
        "type": "scatter",
        "mode": "none",
        "x": x[:-1],
        "y": y[:-1],
        "yaxis": "y2",
        "fill": "toself",
        "hoverinfo": "skip",
        "meta": meta,
    }


def _clear(color: str, opacity: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _unzipped(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def finals(histories: Sequence[RunHistory], key: str) -> list[float]:
    return [value for run in histories if (value := last_value(run, key)) is not None]


def plain_mean(values: Sequence[float]) -> str:
    return number(fmean(values)) if values else number(None)


def share_in_compression(steps: Sequence[Record]) -> float:
    return sum(record.get("phase") == "compression" for record in steps) / len(steps) if steps else 0.0


def _cosines_by_phase(histories: Sequence[RunHistory]) -> list[str]:
    found: Callable[[str], list[float]] = lambda phase: [  # noqa: E731
        value
        for run in histories
        for _, value in cosines_of([r for r in run.steps if (r.get("phase") or "memorization") == phase], "alignment")
    ]
    return [plain_mean(found(phase)) for phase in ("memorization", "compression")]


def layer_signs(rows: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, tuple[float, int]]:
    points: dict[str, Points] = {}
    for step, layers in rows:
        for name, value in layers.items():
            points.setdefault(name, []).append((step, value))
    return {
        name: (fmean(value for _, value in values), len(changes_of_sign(values))) for name, values in points.items()
    }


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value
