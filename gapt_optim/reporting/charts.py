"""The charts of a page of runs: over the steps, by layer, and of the angle between the two gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from .._display.page import Chart, Trace, base_layout, heat_trace, label, line_trace, shortened
from .._display.tables import common_prefix, number, short_names, with_minus
from .records import MEASURES
from .run import Run, compression_spans, is_again, mean_of_last, pressed_entropy, smoothed, switches

MOST_POINTS = 2000
"""Of a line: more than a screen has columns."""
MOST_CELLS = 24_000
"""Of a heat map."""

Seeds = Sequence[Run]


class Shown(NamedTuple):
    """How a column of a run is shown."""

    title: str
    unit: str
    note: str


COLUMNS = {
    "loss": Shown("Loss", "nats", "Cross-entropy of the training steps and of held-out data."),
    "entropy": Shown("Pressed entropy", "nats", "What compression presses: the mean over the layers that count."),
    "linear_entropy": Shown(
        "Linear entropy, not centred", "nats", "Falls when a few tokens grow long, so it proves nothing by itself."
    ),
    "centered_cosine_entropy": Shown(
        "Cosine entropy, centred", "nats", "Blind to token lengths and to a vector that all tokens share."
    ),
    "norm_ratio": Shown("Norm ratio", "largest / median norm", "A rise means that a few tokens outweigh the others."),
    "mean_share": Shown(
        "Share of the mean token", "share of squared norm", "A rise means that all tokens share one large vector."
    ),
    "entropy_share": Shown(
        "Entropy's part of the objective", "share", "Weight times entropy over the whole objective, in compression."
    ),
}
"""What is drawn over steps, in this order."""


class RunCharts:
    """Charts of runs, each with its seeds and in its colour.

    The baseline is drawn wide and pale below the others, so that it shows where they agree with it.
    """

    def __init__(self, runs: Mapping[str, Seeds], colors: Sequence[str], baseline: str) -> None:
        self.runs, self.colors, self.baseline = runs, colors, baseline
        self.every = [run for seeds in runs.values() for run in seeds]
        self.end = max(run.end for run in self.every)
        self.kernels = sorted({pressed_entropy(run) for run in self.every} - {""})

    def over_steps(self, columns: Sequence[str] = tuple(COLUMNS)) -> list[Chart]:
        """Loss, entropies and what can hide in them; an entropy that is the pressed one is not drawn again."""
        shown = [column for column in columns if not all(is_again(run, column) for run in self.every)]
        return [self.chart(column) for column in shown if any(run.has(column) for run in self.every)]

    def chart(self, column: str) -> Chart:
        """One column over the steps."""
        traces: list[Trace] = []
        late: list[Series] = []
        ends = {name: mean_of_last(seeds, column) for name, seeds in self.runs.items()}
        for place, name, seeds in self._drawn():
            held_out = [values for run in seeds if len(values := run.held_out[column].dropna())]
            trained = [values for run in seeds if len(values := run.steps[column].dropna())]
            found = self._training(place, name, trained, dots=column == "entropy_share", faint=bool(held_out))
            found += self._held_out(place, name, held_out)
            if found:
                base = ends.get(self.baseline, 0.0) if name != self.baseline else 0.0
                said = f" ({ends[name] / base - 1:+.1%})" if base > 0 else ""
                found[-1]["meta"]["end"] = number(ends[name]) + with_minus(said)
            traces += found
            late += [values[values.index >= 0.1 * self.end] for values in (*trained, *held_out)]
        traces += self.phases(switch_marks=column in ("loss", "entropy"))
        title, unit, note = COLUMNS[column]
        layout = self._layout(unit)
        after = pd.concat(late) if late else Series(dtype=float)
        if column == "loss" and len(after) and after.min() < after.max():
            room = 0.06 * (after.max() - after.min())  # the steep start would flatten all the rest
            layout["yaxis"]["range"] = [after.min() - room, after.max() + room]
        else:
            layout["yaxis"]["rangemode"] = "tozero"
        if column == "entropy" and self.kernels:
            note = f"{' / '.join(self.kernels).capitalize()}. {note}"
        said = "; ".join(f"{name} {number(ends[name])}" for _, name, _ in self._drawn())
        alternative = f"{title} over {self.end:,} steps, in {unit}. At the end: {said}."
        return Chart(title, note, alternative, traces, layout, over_steps=True)

    def _drawn(self) -> list[tuple[int, str, Seeds]]:
        """Runs with their places, the baseline first: it lies below the others."""
        runs = [(place, name, seeds) for place, (name, seeds) in enumerate(self.runs.items())]
        return sorted(runs, key=lambda run: run[1] != self.baseline)

    def _training(self, place: int, name: str, seeds: list[Series], *, dots: bool, faint: bool) -> list[Trace]:
        if not seeds:
            return []
        color, said = self.colors[place], f"{name}, training" if faint else name
        if dots:
            marks = {"mode": "markers", "marker": {"size": 3, "color": color}}
            return [self._line(place, said, extremes(seeds[0])) | marks]
        if len(seeds) > 1:
            return self._band(place, said, [smoothed(values) for values in seeds])
        raw = self._line(place, said, extremes(seeds[0]))
        raw |= {"line": {"color": color, "width": 0.8}, "opacity": 0.35, "hoverinfo": "skip", "hovertemplate": None}
        raw["meta"]["faint"] = True
        mean = self._line(place, said, extremes(smoothed(seeds[0])))
        if faint:
            mean["line"]["width"], mean["opacity"], mean["meta"]["faint"] = 1.2, 0.6, True
        return [raw, mean]

    def _held_out(self, place: int, name: str, seeds: list[Series]) -> list[Trace]:
        said = f"{name}, held out"
        if len(seeds) > 1:
            return self._band(place, said, seeds)
        marks = {"mode": "lines+markers", "marker": {"size": 6, "color": self.colors[place]}}
        return [self._line(place, said, extremes(values)) | (marks if len(values) <= 60 else {}) for values in seeds]

    def _band(self, place: int, name: str, seeds: list[Series]) -> list[Trace]:
        """Mean over seeds, and what lies between the lowest and the highest."""
        together = blocks(pd.concat(seeds, axis=1).sort_index(), MOST_POINTS)
        low, mean, high = together.min(axis=1), together.mean(axis=1), together.max(axis=1)
        edge = {"line": {"width": 0}, "hoverinfo": "skip", "hovertemplate": None}
        filled = edge | {"fill": "tonexty", "fillcolor": clear(self.colors[place], 0.18)}
        lines = [self._line(place, f"{name}, mean of {len(seeds)}", values) for values in (low, high, mean)]
        return [lines[0] | edge, lines[1] | filled, lines[2]]

    def _line(self, place: int, name: str, values: Series) -> Trace:
        wide = list(self.runs)[place] == self.baseline and len(self.runs) > 1
        color = self.colors[place]
        return line_trace(
            values.index.to_numpy(), values.to_numpy(dtype=np.float32), name, clear(color, 0.5) if wide else color,
            width=5 if wide else 2, meta={"run": place},
        )  # fmt: skip

    def _layout(self, unit: str) -> dict[str, Any]:
        return base_layout(
            xaxis={"range": [0, self.end]},
            yaxis={"title": {"text": label(unit), "standoff": 4}, "overlaying": "y2", "tickmode": "auto"},
            # Phases lie behind the lines, over the whole height.
            yaxis2={"range": [0, 1], "visible": False, "fixedrange": True},
        )

    def phases(self, *, switch_marks: bool) -> list[Trace]:
        """Of each run's first seed, a shade over its compression and a triangle at each switch."""
        traces = []
        for place, seeds in enumerate(self.runs.values()):
            meta = {"run": place, "phases": place}
            traces += _shade(compression_spans(seeds[0].steps), meta, "rgba(56, 139, 253, 0.15)")
            switched = switches(seeds[0].steps)
            if not switch_marks or switched.empty:
                continue
            up = switched.next_phase == "compression"
            symbols = np.where(up, "triangle-right", "triangle-left")
            said = [f"{row.reason}: {row.next_phase} from step {row.Index + 1:,}" for row in switched.itertuples()]
            traces.append(
                {
                    "type": "scattergl" if len(switched) > 2000 else "scatter",
                    "mode": "markers",
                    "x": switched.index.to_numpy(),
                    "y": np.where(up, 0.97, 0.92),
                    "yaxis": "y2",
                    "marker": {"size": 8, "color": "#8b949e", "symbol": symbols},
                    "text": [label(text) for text in said],
                    "hovertemplate": "%{text}<extra></extra>",
                    "meta": meta,
                }
            )
        return traces

    def layer_maps(self) -> list[Chart]:
        """A heat map per run; a select shows the other measures. All runs have one scale."""
        frames = {key: [run.layers[key] for run in self.every if key in run.layers] for key in ("entropy", *MEASURES)}
        highs = {key: max(np.nanquantile(one, 0.995) for one in found) for key, found in frames.items() if found}
        charts = []
        for place, (name, (run, *others)) in enumerate(self.runs.items()):
            traces, views = [], []
            for key, high in highs.items():
                if key not in run.layers or is_again(run, key):
                    continue
                kernel = pressed_entropy(run) if key == "entropy" else ""
                said = f"entropy, {kernel}" if kernel else COLUMNS[key].title.lower()
                views.append((key, said))
                limits = (1.0 if key == "norm_ratio" else 0.0, float(high))
                traces.append(_heat(run.layers[key], limits, said, {"run": place, "view": key}))
            if traces:
                last = run.layers[views[0][0]].ffill().iloc[-1]
                said = f"At the end the lowest is {number(last.min())}, in {last.idxmin()}."
                title = f"{name}, first seed" if others else name
                charts.append(self._map(place, title, traces, "Blue strip: compression.", said, views))
        return charts

    def _map(
        self, place: int, title: str, traces: list[Trace], note: str, said: str, views: Sequence[tuple[str, str]] = ()
    ) -> Chart:
        run = list(self.runs.values())[place][0]
        prefix = shortened(common_prefix([str(name) for name in next(iter(run.layers.values()))]))
        note = f"A row per layer{f' {prefix}*' if prefix else ''}. {note}"
        layers = len(traces[0]["y"])
        strip = _shade([(1, self.end)], {"run": place}, "rgba(139, 148, 158, 0.2)")
        strip += _shade(compression_spans(run.steps), {"run": place}, "#388bfd")
        layout = base_layout(
            hovermode="closest",
            xaxis={"range": [0, self.end]},
            yaxis={"domain": [0, 0.93], "autorange": "reversed", "type": "category", "ticks": "", "showgrid": False},
            yaxis2={"domain": [0.95, 1], "range": [0, 1], "visible": False, "fixedrange": True},
        )
        alternative = f"Heat map of {layers} layers over {self.end:,} steps of {title}. {said}"
        return Chart(
            title, note, alternative, [*traces, *strip], layout, views, over_steps=True, tall=layers > 8, run=place
        )

    def alignment(self) -> list[Chart]:
        """The cosine of the two gradients: a running mean with the spread of single steps, dots, and by layer."""
        traces: list[Trace] = []
        for place, name, seeds in self._drawn():
            at_layers = [values for run in seeds if len(values := run.steps.alignment.dropna())]
            if len(at_layers) == 1:
                mean, spread = with_noise(at_layers[0])
                traces += self._band(place, name, [mean - spread, mean + spread])[:2]
                traces.append(self._line(place, name, extremes(mean)))
                traces[-1]["meta"]["end"] = with_minus(f"{mean.iloc[-1]:+.2f}")
            else:
                traces += self._training(place, name, at_layers, dots=False, faint=False)
            dots = [values for run in seeds if len(values := run.steps.parameter_alignment.dropna())]
            traces += self._training(place, f"{name}, of the parameters", dots, dots=True, faint=False)
        if not traces:
            return []
        layout = self._layout("cosine")
        layout["yaxis"] |= {"zeroline": True}
        note = "Line: running mean at the layers' outputs. Band: one standard deviation of the single steps around it."
        if any(trace["mode"] == "markers" for trace in traces):
            note += " Dots: of the parameters."
        alternative = f"Cosine between loss gradient and entropy gradient over {self.end:,} steps."
        traces += self.phases(switch_marks=False)
        charts = [Chart("Cosine of the two gradients", note, alternative, traces, layout, over_steps=True)]
        for place, (name, seeds) in enumerate(self.runs.items()):
            if "cosine" not in seeds[0].layers:
                continue
            values = seeds[0].layers["cosine"]
            limit = float(np.nanquantile(values.abs(), 0.98)) or 1.0
            trace = _heat(values, (-limit, limit), "cosine", {"run": place}) | {"colorscale": "RdBu"}
            note = "Blue: the gradients agree. Red: they oppose each other."
            said = f"The mean is lowest in {values.mean().idxmin()}."
            charts.append(self._map(place, f"Cosine at each layer, {name}", [trace], note, said))
        return charts


def with_noise(values: Series) -> tuple[Series, Series]:
    """The running mean over a twentieth of the run, and the standard deviation of single steps around it."""
    there = values.dropna()
    mean = smoothed(there, 20)
    return mean, smoothed((there - mean) ** 2, 20).clip(lower=0) ** 0.5


def blocks(frame: DataFrame, limit: int) -> DataFrame:
    """At most so many rows: means over stretches of rows, each named by its last step."""
    if len(frame) <= limit:
        return frame
    stretch = np.arange(len(frame)) * limit // len(frame)
    means = frame.groupby(stretch).mean()
    means.index = Series(frame.index).groupby(stretch).max()
    return means


def extremes(values: Series, limit: int = MOST_POINTS) -> Series:
    """At most so many values, with the lowest and the highest of every stretch among them, and both ends."""
    if len(values) <= limit:
        return values
    stretches = values.groupby(np.arange(len(values)) * ((limit - 2) // 2) // len(values))
    kept = np.concatenate([stretches.idxmin(), stretches.idxmax(), values.index[[0, -1]]])
    return values.loc[np.unique(kept)]


def clear(color: str, opacity: float) -> str:
    """A colour like #1f6feb through which others show."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _heat(values: DataFrame, limits: tuple[float, float], unit: str, meta: dict[str, Any]) -> Trace:
    shown = blocks(values, max(60, min(500, MOST_CELLS // max(1, values.shape[1]))))
    low, high = limits
    return heat_trace(
        shown.set_axis(short_names(shown.columns), axis=1).T, "", zmin=low, zmax=high if high > low else low + 1,
        x=shown.index.to_numpy(), meta=meta,
        colorbar={"thickness": 10, "len": 0.95, "y": 0.47, "outlinewidth": 0, "tickfont": {"size": 11}},
        hovertemplate="%{y}, step %{x:,}: %{z:.4g}<extra>" + label(unit) + "</extra>",
    )  # fmt: skip


def _shade(spans: Sequence[tuple[float, float]], meta: dict[str, Any], color: str) -> list[Trace]:
    """A trace of a filled box per span, from the step before its first to its last; none where there is no span."""
    boxes: Trace = {
        "type": "scatter",
        "mode": "none",
        "x": [at for first, last in spans for at in (first - 1, first - 1, last, last, first - 1, None)][:-1],
        "y": [at for _ in spans for at in (0, 1, 1, 0, 0, None)][:-1],
        "yaxis": "y2",
        "fill": "toself",
        "fillcolor": color,
        "hoverinfo": "skip",
        "meta": meta,
    }
    return [boxes] if spans else []
