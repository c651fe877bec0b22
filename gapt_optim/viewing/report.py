"""One page for a run or several: tables, charts over steps and by layer, settings side by side, first aid."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .charts import color_of
from .doctor import diagnose, verdict
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
from .page import Chart, Markup, Page, Trace, base_layout, escaped, label, number, rounded, table, write_page

Points = list[tuple[float, float]]
Runs = Mapping[str, "RunHistory | Sequence[RunHistory]"]

MOST_POINTS = 1200
"""Points of a line: more than a screen has columns."""

MOST_CELLS = 24_000
"""Cells of one heat map."""

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


def write_report(
    runs: Runs,
    path: str | os.PathLike[str],
    *,
    baseline: str | None = None,
    title: str = "Training with phases",
) -> Path:
    """Write one self-contained HTML page that compares the runs. It opens without a network.

    Long runs are downsampled, keeping the highest and the lowest value of each stretch; every switch of phase is kept.

    >>> steps = [
    ...     {"step": i, "phase": "compression" if i > 5 else "memorization", "loss": 3 - i / 10, "entropy": 1.5,
    ...      "layer_entropy": {"h.0": 1.6, "h.1": 1.4}, "alignment": {"cosine": 0.1 * (-1) ** i, "layers": {}}}
    ...     for i in range(1, 11)
    ... ]
    >>> run = RunHistory(steps)
    >>> write_report({"gapt": run}, "report.html").name
    'report.html'

    Args:
        runs: by name. Several histories under one name are seeds of one run: their mean is drawn, with a band from the
            lowest to the highest.
        path: of the page.
        baseline: the run that the others are compared with; by default ``plain`` where there is one, else the first.
        title: heading of the page.

    Returns:
        The path.

    Raises:
        ValueError: ``runs`` is empty, or ``baseline`` is none of them.
        ImportError: plotly is not installed.
    """
    return write_page(report_page(runs, baseline=baseline, title=title), path)


def report_page(runs: Runs, *, baseline: str | None = None, title: str = "Training with phases") -> Page:
    """The page of :func:`write_report`, not yet written."""
    if not runs:
        raise ValueError("runs is empty; pass at least one run, for example {'gapt': read_run(folder)}")
    seeds = {name: [run] if isinstance(run, RunHistory) else list(run) for name, run in runs.items()}
    for name, histories in seeds.items():
        if not histories:
            raise ValueError(f"run {name!r} has no history; pass at least one")
    if baseline is None:
        baseline = "plain" if "plain" in seeds else next(iter(seeds))
    if baseline not in seeds:
        raise ValueError(f"baseline={baseline!r} is none of the runs {list(seeds)}")
    return _Report(seeds, baseline, title).page()


class _Report:
    def __init__(self, runs: dict[str, list[RunHistory]], baseline: str, title: str) -> None:
        self.runs, self.baseline = runs, baseline
        self.colors = [color_of(name, i) for i, name in enumerate(runs)]
        self.end = max((record["step"] for run in self._all() for record in run.steps), default=1)
        self.end = max([self.end, *(record["step"] for run in self._all() for record in run.validations)])
        spans = [sum(len(compression_spans(run.steps)) for run in histories) for histories in runs.values()]
        # The last run is the one of interest, as in the pictures, unless it never compressed.
        compressed = [i for i, count in enumerate(spans) if count]
        self.main = compressed[-1] if compressed else None
        self.page_ = Page(title, self._subtitle(), list(zip(runs, self.colors, strict=True)), self.main)

    def _all(self) -> Iterable[RunHistory]:
        return (run for histories in self.runs.values() for run in histories)

    def _subtitle(self) -> str:
        steps = sum(len(run.steps) for run in self._all())
        seeds = sum(map(len, self.runs.values()))
        of_seeds = f" ({seeds} with their seeds)" if seeds > len(self.runs) else ""
        versions = sorted({run.version for run in self._all() if run.version})
        made = f", trained with gapt_optim {' and '.join(versions)}" if versions else ""
        return f"{_count(len(self.runs), 'run')}{of_seeds}, {_count(steps, 'step')}{made}."

    def page(self) -> Page:
        page = self.page_
        if notes := self._notes():
            page.add("notes", "What is missing", f'<ul class="notes">{notes}</ul>')
        page.add("summary", "Summary", self._summary())
        page.add("findings", "First aid", self._findings())
        page.add("steps", "Over the steps", self._phases_line(), self._over_steps())
        page.add("phases", "Phases", "", self._phases())
        if maps := self._layer_maps():
            note = (
                "<p>One row per layer, the first at the top. The strip above shows the phases: blue is compression.</p>"
            )
            page.add("layers", "By layer", note, maps)
        if alignment := self._alignment():
            note = (
                "<p>The cosine between the loss gradient and the entropy gradient: above 0 they agree, below 0 "
                "compression "
                "costs loss.</p>"
            )
            page.add("alignment", "Alignment", note + self._sign_table(), alignment)
        page.add("settings", "Settings", self._settings())
        return page

    # Tables and texts

    def _notes(self) -> str:
        items = []
        for name, histories in self.runs.items():
            for i, run in enumerate(histories):
                of_seed = f", seed {i + 1} of {len(histories)}" if len(histories) > 1 else ""
                items += [f"<li><b>{escaped(name)}</b>{of_seed}: {escaped(note)}</li>" for note in run.notes]
                if not run.steps and not run.notes:
                    items.append(f"<li><b>{escaped(name)}</b>{of_seed}: no step is there yet</li>")
        versions = {run.version for run in self._all()}
        if len(versions) > 1:
            shown = " and ".join(sorted("an unnamed version" if v is None else f"version {v}" for v in versions))
            items.append(f"<li>The runs were made by {escaped(shown)}; fields may differ.</li>")
        return "".join(items)

    def _summary(self) -> str:
        columns = ["run", "steps", "held-out loss" if self._held_out() else "loss", "entropy", "linear entropy",
                   "centred cosine entropy", "norm ratio", "mean share", "in compression", "switches"]  # fmt: skip
        rows: list[list[object]] = []
        base = self.runs[self.baseline]
        for name, histories in self.runs.items():
            several = f" ({len(histories)} seeds)" if len(histories) > 1 else ""
            row: list[object] = [f"{name}{several}", f"{max((len(run.steps) for run in histories), default=0):,}"]
            for key in ("loss", "entropy", "measures.linear_entropy", "measures.centered_cosine_entropy"):
                row.append(_with_change(_finals(histories, key), _finals(base, key), name != self.baseline))
            row += [_plain_mean(_finals(histories, f"measures.{key}")) for key in ("norm_ratio", "mean_share")]
            shares = [_share(run.steps) for run in histories if run.steps]
            row.append(f"{fmean(shares):.0%}" if shares else number(None))
            row.append(f"{fmean(len(switches_of(run.steps)) for run in histories):g}")
            rows.append(row)
        keep = [i for i in range(len(columns)) if i < 2 or any(row[i] != number(None) for row in rows)]
        rows = [[row[i] for i in keep] for row in rows]
        held = "the last held-out values where there are some, else means over the last training steps"
        caption = f"At the end: {held}. Changes are against {self.baseline}."
        return table([columns[i] for i in keep], rows, caption)

    def _held_out(self) -> bool:
        return any(values_of(run.validations, "loss") for run in self._all())

    def _findings(self) -> str:
        parts = []
        for name, histories in self.runs.items():
            many = len(histories) > 1
            for i, run in enumerate(histories):
                found = diagnose(run)
                of_seed = f", seed {i + 1}" if many else ""
                if not found and many and i:
                    continue
                items = "".join(
                    f"<li><b>{escaped(one.title)}.</b> {escaped(one.what)} {escaped(one.why)} "
                    f'<span class="change-line"><b>Change:</b> {escaped(one.change)}</span></li>'
                    for one in found
                )
                text = f'<ul class="findings">{items}</ul>' if items else f"<p>{escaped(verdict(run, found))}</p>"
                parts.append(f"<h3>{escaped(name)}{of_seed}</h3>{text}")
        return "".join(parts)

    def _settings(self) -> str:
        flat = {name: _flat(histories[0].settings) for name, histories in self.runs.items()}
        keys = sorted({key for settings in flat.values() for key in settings})
        if not keys:
            return "<p>No run folder holds its settings.</p>"
        rows = []
        differing = 0
        for key in keys:
            values = [settings.get(key) for settings in flat.values()]
            differs = any(value != values[0] for value in values)
            differing += differs
            cells = "".join(f"<td>{escaped(_shown(value))}</td>" for value in values)
            mark = "differs" if differs else "same"
            said = '<td class="said">differs</td>' if differs else "<td></td>"
            rows.append(
                f'<tr class="{mark}"><th scope="row">{escaped(key)}</th>{cells}{said if len(flat) > 1 else ""}</tr>'
            )
        names = "".join(f'<th scope="col">{escaped(name)}</th>' for name in flat)
        several = len(flat) > 1
        head = f'<tr><th scope="col">setting</th>{names}{"<th scope=col></th>" if several else ""}</tr>'
        choose, kind = "", "settings all"
        if several:
            kind = "settings" if differing else "settings all"
            checked = "" if differing else " checked"
            choose = (
                f"<p>{_count(differing, 'setting')} differ{'s' if differing == 1 else ''}. <label "
                'class="no-print"><input '
                f'type="checkbox" id="all-settings"{checked}> Show all {len(keys)}</label></p>'
            )
        return (
            f'{choose}<div class="scroll" tabindex="0" role="region" aria-label="Settings"><table '
            f'class="{kind}"><thead>'
            f"{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
        )

    def _phases_line(self) -> str:
        if self.main is None:
            return "<p>No run was in compression.</p>"
        return (
            "<p>Shaded: compression. Triangles mark the switches of phase, with the reason on hover. Thin lines "
            "are training "
            "steps, thick ones their running mean, dots held-out values.</p>"
        )

    # Charts over steps

    def _over_steps(self) -> list[Chart]:
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
            finals = _finals(histories, key)
            firsts = [points[0][1] for points in trained if points]
            lows = [min(value for _, value in points) for points in trained if points]
            rows.append([name, _plain_mean(firsts), _plain_mean(lows), _plain_mean(finals)])
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
            x, y = _boxes(spans)
            meta = {"run": i, "phases": i, "role": "shade"}
            traces.append(
                {
                    "type": "scatter",
                    "mode": "none",
                    "x": x,
                    "y": y,
                    "yaxis": "y2",
                    "fill": "toself",
                    "hoverinfo": "skip",
                    "meta": meta,
                }
            )
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

    def _phases(self) -> list[Chart]:
        names = [label(name) for name in self.runs]
        shares = [fmean([_share(run.steps) for run in histories] or [0.0]) for histories in self.runs.values()]
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

    # Charts by layer

    def _layer_maps(self) -> list[Chart]:
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
                x, y = _boxes(boxes)
                strip.append(
                    {
                        "type": "scatter",
                        "mode": "none",
                        "x": x,
                        "y": y,
                        "yaxis": "y2",
                        "fill": "toself",
                        "hoverinfo": "skip",
                        "meta": {"run": i, "role": role},
                    }
                )
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

    # Alignment

    def _alignment(self) -> list[Chart]:
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
            counts = _layer_signs(per_layer)
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

    def _sign_table(self) -> str:
        tables = {}
        for name, histories in self.runs.items():
            if per_layer := layer_rows(histories[0], "cosine"):
                tables[name] = _layer_signs(per_layer)
        if not tables:
            return ""
        layers = list(dict.fromkeys(layer for counts in tables.values() for layer in counts))
        rows = [
            [layer, *(f"{tables[n][layer][1]:,}" if layer in tables[n] else "" for n in tables)] for layer in layers
        ]
        inner = table(["layer", *tables], rows, "Steps at which the cosine at a layer changed its sign")
        return f"<details><summary>Sign changes by layer</summary>{inner}</details>"


# Downsampling


def extremes(points: Sequence[tuple[float, float]], limit: int) -> Points:
    """At most ``limit`` points, with the lowest and the highest of every stretch among them, and both ends."""
    if len(points) <= limit:
        return list(points)
    kept: Points = [points[0]]
    for stretch in _stretches(points, max(1, (limit - 2) // 2)):
        low, high = min(stretch, key=_value), max(stretch, key=_value)
        kept += sorted({low, high})
    kept.append(points[-1])
    return sorted(set(kept))


def thinned(points: Sequence[tuple[float, float]], limit: int) -> Points:
    """At most ``limit`` points, the last of every stretch; for what is smooth already."""
    if len(points) <= limit:
        return list(points)
    return [points[0], *(stretch[-1] for stretch in _stretches(points, limit - 1))]


def band(seeds: Sequence[Points], limit: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, lowest, mean and highest over seeds, each seed's mean within common stretches of steps."""
    steps = sorted({step for points in seeds for step, _ in points})
    edges = [stretch[-1] for stretch in _stretches(steps, limit)] if len(steps) > limit else steps
    means: list[dict[int, float]] = []
    for points in seeds:
        sums: dict[int, list[float]] = {}
        at = 0
        for step, value in points:
            while edges[at] < step:
                at += 1
            sums.setdefault(at, []).append(value)
        means.append({at: fmean(values) for at, values in sums.items()})
    found: tuple[list[float], list[float], list[float], list[float]] = ([], [], [], [])
    for at, edge in enumerate(edges):
        values = [mean[at] for mean in means if at in mean]
        if values:
            for column, value in zip(found, (edge, min(values), fmean(values), max(values)), strict=True):
                column.append(value)
    return found


def heat_map(
    rows: Sequence[tuple[float, Mapping[str, float]]],
) -> tuple[list[float], list[str], list[list[float | None]]]:
    """Steps, layers, and the values (layers, steps), means over stretches where there are more steps than cells."""
    names: list[str] = max((list(layers) for _, layers in rows), key=len)
    limit = max(60, min(500, MOST_CELLS // max(1, len(names))))
    steps: list[float] = []
    columns: list[list[float | None]] = []
    for stretch in _stretches(rows, limit) if len(rows) > limit else ([row] for row in rows):
        steps.append(stretch[-1][0])
        column: list[float | None] = []
        for name in names:
            values = [value for _, layers in stretch if (value := layers.get(name)) is not None]
            column.append(fmean(values) if values else None)
        columns.append(column)
    return steps, names, [rounded(column[i] for column in columns) for i in range(len(names))]


def _stretches(items: Sequence[Any], count: int) -> Iterable[Sequence[Any]]:
    """So many parts of nearly equal length, one after another."""
    for i in range(count):
        part = items[i * len(items) // count : (i + 1) * len(items) // count]
        if part:
            yield part


def _value(point: tuple[float, float]) -> float:
    return point[1]


# Traces


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


def _boxes(spans: Sequence[tuple[float, float]]) -> tuple[list[float | None], list[float | None]]:
    """The outline of one box per span, from the step before its first to its last."""
    x: list[float | None] = []
    y: list[float | None] = []
    for first, last in spans:
        x += [first - 1, first - 1, last, last, first - 1, None]
        y += [0, 1, 1, 0, 0, None]
    return x[:-1], y[:-1]


def _clear(color: str, opacity: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _unzipped(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


# Figures of a run


def _finals(histories: Sequence[RunHistory], key: str) -> list[float]:
    return [value for run in histories if (value := last_value(run, key)) is not None]


def _plain_mean(values: Sequence[float]) -> str:
    return number(fmean(values)) if values else number(None)


def _with_change(values: Sequence[float], base: Sequence[float], compared: bool) -> str:
    if not values:
        return number(None)
    mean = fmean(values)
    text = number(mean, 4)
    if compared and base and fmean(base):
        percent = f"{mean / fmean(base) - 1:+.1%}".replace("-", "\N{MINUS SIGN}")
        return Markup(f'{escaped(text)} <span class="change">({escaped(percent)})</span>')
    return text


def _share(steps: Sequence[Record]) -> float:
    return sum(record.get("phase") == "compression" for record in steps) / len(steps) if steps else 0.0


def _cosines_by_phase(histories: Sequence[RunHistory]) -> list[str]:
    found: Callable[[str], list[float]] = lambda phase: [  # noqa: E731
        value
        for run in histories
        for _, value in cosines_of([r for r in run.steps if (r.get("phase") or "memorization") == phase], "alignment")
    ]
    return [_plain_mean(found(phase)) for phase in ("memorization", "compression")]


def _layer_signs(rows: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, tuple[float, int]]:
    points: dict[str, Points] = {}
    for step, layers in rows:
        for name, value in layers.items():
            points.setdefault(name, []).append((step, value))
    return {
        name: (fmean(value for _, value in values), len(changes_of_sign(values))) for name, values in points.items()
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _shown(value: Any) -> str:
    return "\N{EN DASH}" if value is None else str(value)


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _count(number_of: int, what: str) -> str:
    return f"{number_of:,} {what}{'' if number_of == 1 else 's'}"
